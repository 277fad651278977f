"""For all packages: a torchvision whose library was built for another torch can be imported all the same."""

from __future__ import annotations

import importlib
import sys

import torch

_declared: list[torch.library.Library] = []


def _let_torchvision_be_imported() -> None:
    """timm and transformers import it for what is plain Python; its compiled operators no test here calls.

    Without its library two of them are missing, whose shapes it wants to register: it is enough to declare them.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared.append(torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            _declared[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_let_torchvision_be_imported()
