"""Move a prompt into weights, LoRA, memory tokens or a KV prefix, and prove what arrived."""

from workbench.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "ALIASES": "sycomode.registry",
        "Document": "sycomode.data",
        "Lesson": "sycomode.selfstudy",
        "OBJECTIVES": "sycomode.registry",
        "Objective": "sycomode.registry",
        "Prompted": "sycomode.students",
        "Question": "sycomode.data",
        "Recovery": "sycomode.evaluate",
        "STUDENTS": "sycomode.registry",
        "Targets": "sycomode.objectives",
        "Task": "sycomode.data",
        "build_student": "sycomode.students",
        "forward_kl": "sycomode.objectives",
        "generalised_jsd": "sycomode.objectives",
        "microworld_task": "sycomode.data",
        "recovery": "sycomode.evaluate",
        "reverse_kl": "sycomode.objectives",
        "sample": "sycomode.selfstudy",
        "study": "sycomode.selfstudy",
        "topk_tail_kl": "sycomode.objectives",
    },
)
