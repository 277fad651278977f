"""Every public name of 0.1.0 can still be imported from where it was."""

from __future__ import annotations

import importlib
import pydoc
import re
import subprocess
import sys

import pytest

import kvb

PUBLIC = {
    "kvb": [
        "BottleneckOutput",
        "BottleneckedEncoder",
        "CLIPBottleneckedEncoder",
        "CheckpointError",
        "CodeDataset",
        "ConvMixerBottleneckedEncoder",
        "DinoBottleneckedEncoder",
        "DiscreteKeyValueBottleneck",
        "DiscreteKeyValueBottleneckConfig",
        "KeyReport",
        "KeyValueBottleneck",
        "SLPretrainedBottleneckedEncoder",
        "SwavBottleneckedEncoder",
        "VICRegBottleneckedEncoder",
        "__version__",
        "compat",
        "decoders",
        "functional",
        "info",
        "load",
        "optim",
        "save",
        "splitters",
        "training",
        "unlearning",
    ],
    "kvb.functional": ["LAYOUTS", "POOLS", "gather", "lookup", "nearest", "pack_keys", "sample"],
    "kvb.splitters": ["Chunk", "LearnedProjection", "MODES", "RandomProjection", "SparseProjection", "make"],
    "kvb.decoders": ["CodebookVoting", "LinearProbe", "MLP", "add_distance_to_values"],
    "kvb.data": ["CodeDataset", "encode"],
    "kvb.optim": ["Finding", "RowwiseAdagrad", "RowwiseAdam", "RowwiseSGD", "audit", "clip_grad_norm_", "param_groups"],
    "kvb.training": ["SGDStep", "sgd_step"],
    "kvb.unlearning": ["class_hits", "erase", "forget", "hits", "mask_by_activations", "mask_by_examples", "overlap"],
    "kvb.growth": ["add_pairs", "distance_threshold", "none_near"],
    "kvb.checkpoints": ["CheckpointError", "load", "save"],
    "kvb.compat": [
        "alias",
        "discrete_key_value_bottleneck",
        "discrete_key_value_bottleneck_pytorch",
        "from_published",
        "key_value_bottleneck",
        "module_from",
        "to_published",
        "unalias",
    ],
    "kvb.ops": ["CPU_CAPABILITIES", "IN_PLACE", "NAMES", "SCHEMAS", "absent", "backend", "gather_row_grad", "lookup"],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_names_are_where_they_were(module):
    found = importlib.import_module(module)
    missing = [name for name in PUBLIC[module] if not hasattr(found, name)]
    assert not missing, f"{module} lacks {', '.join(missing)}"


def test_the_names_are_complete_and_rooms_are_imported_late():
    """``dir(kvb)`` serves completion; a room costs nothing until it is asked for."""
    code = (
        "import kvb, sys; print(*dir(kvb)); print('kvb.compat' in sys.modules, kvb.compat.alias, kvb.splitters.Chunk)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, late = done.stdout.splitlines()
    assert not {*PUBLIC["kvb"], "KeyValueClassifier", "counting", "growth"} - {*names.split()}
    assert late.startswith("False ")
    with pytest.raises(AttributeError, match="module 'kvb' has no attribute 'no_such_name'"):
        _ = kvb.no_such_name


def test_help_is_a_page():
    lines = pydoc.plain(pydoc.render_doc(kvb)).splitlines()
    assert len(lines) < 100
    named = {*re.findall(r"\w+", kvb.__doc__)}
    hidden = {"__version__", "DiscreteKeyValueBottleneckConfig"} | {name for name in PUBLIC["kvb"] if "Encoder" in name}
    assert {*PUBLIC["kvb"], "KeyValueClassifier", "counting", "growth"} - hidden <= named
