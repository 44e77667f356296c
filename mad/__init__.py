"""Cheap synthetic tasks that tell sequence-model layers apart.   [arXiv 2403.17844]"""

from workbench.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "LAYERS": "mad.registry",
        "TASKS": "mad.registry",
        "LayerSpec": "mad.registry",
        "TaskSpec": "mad.registry",
        "Layer": "mad.layers.layer",
        "Task": "mad.tasks.task",
        "Rows": "mad.tasks.task",
        "generate": "mad.tasks.task",
        "LanguageModel": "mad.model",
        "build_model": "mad.model",
        "evaluate": "mad.evaluate",
    },
)
