"""Codebooks for the quantised part Q and the factors L, R."""
