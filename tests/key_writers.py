"""Every way to write to the keys of a module that is known.

A way is a generator: what it does before its ``yield`` happens before the keys are packed, the rest afterwards.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import threading
import weakref

import numpy as np
import torch
from torch import nn

C, K, D = 2, 24, 3
WAYS = {}


def way(function):
    WAYS[function.__name__] = function
    return function


# --- at once ----------------------------------------------------------------------------------------------------------


def at_once(name, write):
    def run(module, new):
        yield
        write(module, new)

    WAYS[name] = run


def _data(module, new):
    module.keys.data = new.clone()


def _attribute(module, new):
    module.keys = new.clone()


def _data_item(module, new):
    module.keys.data[...] = new


def _item(module, new):
    module.keys[...] = new


def _ctypes(module, new):
    keys = module.keys
    ctypes.memmove(keys.data_ptr(), new.data_ptr(), new.nbytes)


def _memoryview(module, new):
    memoryview(module.keys.numpy()).cast("B")[:] = new.numpy().tobytes()


def _numpy_of_buffers(module, new):
    for name, buffer in module.named_buffers():
        if name == "keys":
            np.copyto(buffer.numpy(), new.numpy())


def _data_of_all(module, new):
    for buffer in nn.Sequential(module).buffers():
        if buffer.shape == new.shape:
            buffer.data.copy_(new)


def _state_dict(module, new):
    module.state_dict()["keys"].data.copy_(new)


def _load(module, new):
    module.load_state_dict({**module.state_dict(), "keys": new})


def _assign(module, new):
    module.load_state_dict({**module.state_dict(), "keys": new.clone()}, assign=True)


def _as_a_state_dict_is_loaded_in_place(module, new):
    with torch.autograd._unsafe_preserve_version_counter((module.keys,)):
        module.keys.copy_(new)


def _inference(module, new):
    with torch.inference_mode():
        module.keys.copy_(new)


def _swapped(module, new):
    torch.utils.swap_tensors(module.keys, new.clone())


def _sgd(module, new):
    keys = module.keys
    keys.grad = keys - new
    torch.optim.SGD([keys], lr=1.0, foreach=True).step()
    keys.grad = None
    keys.copy_(new)


def _averaged(module, new):
    source = copy.deepcopy(module)
    source.keys.copy_(new)
    average = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    average.module, average.n_averaged = module, torch.zeros(())
    average.update_parameters(source)


def _unflattened(module, new):
    torch.nn.utils.vector_to_parameters(new.flatten(), [module.keys])


def _applied(module, new):
    module._apply(lambda tensor: new.clone() if tensor.shape == new.shape else tensor)


def _resized(module, new):
    module.keys.resize_(0).resize_(new.shape).copy_(new)


def _other_strides(module, new):
    module.keys.data = new.transpose(0, 2).contiguous().transpose(0, 2)


def _exchanged_at_one_address(module, new):
    keys = module.keys
    keys.set_(keys.untyped_storage(), 0, (C, K, D), (D, C * D, 1))  # the same memory in another order
    keys.data.copy_(new)


for _name, _write in {
    "copy_": lambda module, new: module.keys.copy_(new),
    "item": _item,
    "data.copy_": lambda module, new: module.keys.data.copy_(new),
    "data[...]": _data_item,
    "data =": _data,
    "attribute": _attribute,
    "numpy": lambda module, new: np.copyto(module.keys.numpy(), new.numpy()),
    "asarray": lambda module, new: np.copyto(np.asarray(module.keys), new.numpy()),
    "dlpack": lambda module, new: torch.from_dlpack(module.keys).copy_(new),
    "dlpack capsule": lambda module, new: torch.from_dlpack(torch.utils.dlpack.to_dlpack(module.keys)).copy_(new),
    "detach": lambda module, new: module.keys.detach().copy_(new),
    "view": lambda module, new: module.keys.data.view(-1).copy_(new.flatten()),
    "set_": lambda module, new: module.keys.set_(new.clone()),
    "storage": lambda module, new: module.keys.untyped_storage().copy_(new.untyped_storage()),
    "ctypes": _ctypes,
    "memoryview": _memoryview,
    "foreach": lambda module, new: torch._foreach_copy_([module.keys.data], [new]),
    "out=": lambda module, new: torch.add(new, 0, out=module.keys.data),
    "index_put_": lambda module, new: module.keys.data.index_put_((torch.arange(C),), new),
    "index_copy_": lambda module, new: module.keys.data.index_copy_(0, torch.arange(C), new),
    "scatter_": lambda module, new: module.keys.data.scatter_(0, torch.arange(C)[:, None, None].expand_as(new), new),
    "swap_tensors": _swapped,
    "load_state_dict": _load,
    "load_state_dict(assign=True)": _assign,
    "state_dict": _state_dict,
    "no new version": _as_a_state_dict_is_loaded_in_place,
    "inference mode": _inference,
    "optimizer": _sgd,
    "AveragedModel": _averaged,
    "vector_to_parameters": _unflattened,
    "buffers": _data_of_all,
    "named_buffers": _numpy_of_buffers,
    "get_buffer": lambda module, new: module.get_buffer("keys").data.copy_(new),
    "_buffers": lambda module, new: module._buffers["keys"].data.copy_(new),
    "vars": lambda module, new: vars(module)["_buffers"]["keys"].data.copy_(new),
    "dict of buffers": lambda module, new: dict(module._buffers)["keys"].data.copy_(new),
    "buffers unpacked": lambda module, new: {**vars(module)["_buffers"]}["keys"].data.copy_(new),
    "buffers joined": lambda module, new: (vars(module)["_buffers"] | {})["keys"].data.copy_(new),
    "buffers got": lambda module, new: vars(module)["_buffers"].get("keys").data.copy_(new),
    "buffers copied": lambda module, new: copy.copy(module)._buffers["keys"].data.copy_(new),
    "_apply": _applied,
    "resize_": _resized,
    "other strides": _other_strides,
    "other order": _exchanged_at_one_address,
}.items():
    at_once(_name, _write)


# --- with something that was kept -------------------------------------------------------------------------------------


def kept(name, take, write=lambda held, new: held.copy_(new)):
    def run(module, new):
        held = take(module)
        yield
        write(held, new)

    WAYS[f"kept: {name}"] = run


def _rows(held, new):
    for row, fresh in zip(held, new, strict=True):
        row.copy_(fresh)


def _keys_among(held, new):
    for buffer in held:
        if buffer.shape == new.shape:
            buffer.data.copy_(new)


def _bytes(held, new):
    held[:] = new.numpy().tobytes()


def _step(held, new):
    held.param_groups[0]["params"][0].data.copy_(new)


def _writer(module):
    keys = module.keys
    return lambda new: keys.data.copy_(new)


for _name, _take, *_write in (
    ("data", lambda module: module.keys.data),
    ("keys", lambda module: module.keys, lambda held, new: held.data.copy_(new)),
    ("detached", lambda module: module.keys.detach(), lambda held, new: held.data.copy_(new)),
    ("view", lambda module: module.keys.data[:, :], lambda held, new: held.copy_(new)),
    ("rows", lambda module: list(module.keys.data), _rows),
    ("numpy", lambda module: module.keys.numpy(), lambda held, new: np.copyto(held, new.numpy())),
    ("memoryview", lambda module: memoryview(module.keys.numpy()).cast("B"), _bytes),
    ("dlpack", lambda module: torch.from_dlpack(module.keys)),
    ("storage", lambda module: module.keys.untyped_storage(), lambda held, new: held.copy_(new.untyped_storage())),
    ("state_dict", lambda module: module.state_dict(), lambda held, new: held["keys"].data.copy_(new)),
    ("buffers", lambda module: list(module.buffers()), _keys_among),
    ("iterator", lambda module: module.buffers(), _keys_among),
    ("dict", lambda module: vars(module), lambda held, new: held["_buffers"]["keys"].data.copy_(new)),
    ("_buffers", lambda module: module._buffers, lambda held, new: held["keys"].data.copy_(new)),
    ("items", lambda module: module._buffers.items(), lambda held, new: dict(held)["keys"].data.copy_(new)),
    ("values", lambda module: module._buffers.values(), _keys_among),
    ("weak reference", lambda module: weakref.ref(module.keys), lambda held, new: held().data.copy_(new)),
    ("twin", copy.copy, lambda held, new: held.keys.data.copy_(new)),
    ("optimizer", lambda module: torch.optim.SGD([module.keys], lr=1.0), _step),
    ("closure", _writer, lambda held, new: held(new)),
):
    kept(_name, _take, *_write)


@way
def another_module(module, new):
    other = nn.Module()
    other.register_buffer("mine", module.keys)
    yield
    other.mine.data.copy_(new)


@way
def shared_memory(module, new):
    module.share_memory()
    yield
    torch.from_dlpack(module.keys).copy_(new)


@way
def given_by_numpy(module, new):
    array = np.zeros((C, K, D), np.float32)
    module.keys = torch.from_numpy(array)
    yield
    array[...] = new.numpy()


@way
def given_by_a_buffer(module, new):
    memory = bytearray(new.nbytes)
    module.keys = torch.frombuffer(memory, dtype=torch.float32).view(C, K, D)
    yield
    memory[:] = new.numpy().tobytes()


@way
def a_slice_of_a_larger_tensor(module, new):
    whole = torch.zeros(2 * C, K, D)
    module.keys = whole[1 : 1 + C]
    yield
    whole.data[1 : 1 + C] = new


@way
def a_function_of_the_module(module, new):
    yield
    torch.func.functional_call(module, {}, (torch.randn(4, C, 1, D),))
    gc.collect()
    module.keys.data.copy_(new)


@way
def a_thread(module, new):
    start, keys = threading.Event(), module.keys

    def work():
        start.wait()
        keys.data.copy_(new)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    start.set()
    thread.join()


def write_in_a_child(module, new):
    """The keys lie in shared memory; a forked process writes them."""
    child = os.fork()
    if child == 0:
        np.copyto(module.keys.numpy(), new.numpy())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@way
def another_process(module, new):
    module.share_memory()
    yield
    write_in_a_child(module, new)
