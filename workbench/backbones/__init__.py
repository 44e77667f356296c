"""The built-in language models: recipes, structured start, training and evaluation."""

from workbench.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Recipe": "workbench.backbones.recipes",
        "Stage": "workbench.backbones.recipes",
        "RECIPES": "workbench.backbones.recipes",
        "find_recipe": "workbench.backbones.recipes",
        "quick": "workbench.backbones.recipes",
        "build_model": "workbench.backbones.training",
        "train_backbone": "workbench.backbones.training",
        "evaluate_backbone": "workbench.backbones.evaluation",
    },
)
