"""Split a trained detector's head by class, and measure whether several heads help."""

__version__ = "0.1.0"

# Public name -> the module it comes from. Nothing is imported before it is used (PEP 562):
# `mhdet --help` and `import mhdet` stay far below half a second, although torch takes several.
_HOME = {
    "load_config": "core.config",
    "open_data": "data.splits",
    "evaluate": "evaluation.metrics",
    "confusion": "evaluation.confusion",
    "error_profile": "evaluation.errors",
    "compare": "evaluation.compare",
    "Head": "partition.heads",
    "Partition": "partition.heads",
    "load_heads": "partition.heads",
    "save_heads": "partition.heads",
    "anti_confusion": "partition.strategies",
    "optimal": "partition.optimal",
    "MultiHead": "model.multihead",
    "Detector": "model.detector",
    "decode": "model.detector",
    "detect": "model.detector",
    "split_heads": "model.surgery",
    "add_head": "model.growth",
    "drop_head": "model.growth",
    "merge_heads": "model.growth",
    "reassign": "model.growth",
    "retrain_head": "model.growth",
    "RoutedLoss": "model.loss",
    "targets_from_boxes": "model.assign",
    "load_run": "experiment.models",
    "train": "experiment.run",
    "study": "experiment.study",
    "grow": "experiment.grow",
    "head_cards": "experiment.head_cards",
    "to_onnx": "tools.onnx",
    "run_onnx": "tools.onnx",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'mhdet' has no attribute {name!r}; it has {', '.join(_HOME)}")
    from importlib import import_module

    value = getattr(import_module(f"mhdet.{_HOME[name]}"), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__():
    return sorted({*globals(), *_HOME})
