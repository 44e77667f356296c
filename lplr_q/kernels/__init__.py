"""The product of activations with a coded matrix: operator, CPU kernel and CUDA kernel."""
