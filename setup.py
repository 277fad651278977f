"""The package list, the README and the build of the C++ extension; everything else is in pyproject.toml."""

import os
import re
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# KVB_BUILD_EXT: build the extension where that is possible, or fail where it is not, or never build it.
CHOICES = ("auto", "1", "0")
HOW = "To get it, have torch>=2.10 and g++ installed and run: pip install --no-build-isolation ."
# KVB_SANITIZE: what `make sanitize` adds.
SANITIZERS = {
    "": [],
    "1": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
# These follow the user's own flags, among which -ffast-math would make every bound on rounding wrong.
EXACT_MATH = [
    *("-fno-fast-math", "-fno-unsafe-math-optimizations", "-fno-associative-math", "-fno-reciprocal-math"),
    *("-fno-finite-math-only", "-fsigned-zeros"),
]


def setting(name, default, allowed):
    value = os.environ.get(name, default)
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed values are {', '.join(filter(None, allowed))}")
    return value


choice = setting("KVB_BUILD_EXT", "auto", CHOICES)
sanitize = setting("KVB_SANITIZE", "", SANITIZERS)
sources = sorted(glob("csrc/**/*.cpp", recursive=True))
# kvb/kernels is a symlink to kernels/, which has no __init__.py: so no top-level `kernels` is ever
# installed, and another package of that name is never shadowed.
arguments = {"packages": [*find_packages(include=["kvb", "kvb.*"]), "kvb.kernels"]}


class BuildPython(build_py):
    """Takes the kernels from kernels/ where kvb/kernels is no link: Windows, core.symlinks=false, some archives."""

    def get_package_dir(self, package):
        folder = super().get_package_dir(package)
        return folder if package != "kvb.kernels" or Path(folder).is_dir() else "kernels"


arguments["cmdclass"] = {"build_py": BuildPython}


def readme():
    """README.md for a package index: with links into the source repository where README has relative ones."""
    source = re.search(r'^Source = "(.*?)"', Path("pyproject.toml").read_text(), re.MULTILINE)[1]
    text = re.sub(r"!\[([^]]*)\]\((?!https?:)([^)]+)\)", rf"![\1]({source}/raw/main/\2)", Path("README.md").read_text())
    return re.sub(r"(?<!!)\[([^]]*)\]\((?!https?:|#)([^)]+)\)", rf"[\1]({source}/blob/main/\2)", text)


arguments |= {"long_description": readme(), "long_description_content_type": "text/markdown"}


def missing():
    """Why the extension cannot be built here; empty where it can."""
    if not sources:
        return "there is nothing to build: csrc/ holds no .cpp file"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded Python loads no stable-ABI extension"
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch cannot be imported ({error})"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    compiler = os.environ.get("CXX", "c++").split()[0]
    return "" if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"


def do_without(why):
    """An error if the extension is a must; else one line about the pure package that this becomes."""
    if choice == "1":
        raise RuntimeError(f"KVB_BUILD_EXT=1, but {why}. {HOW}")
    if choice == "auto" and sources and {"bdist_wheel", "editable_wheel", "build_ext"} & set(sys.argv):
        print(f"kvb: no C++ extension, because {why}. {HOW}", file=sys.stderr)
    if "editable_wheel" in sys.argv:
        Path("kvb/_C.abi3.so").unlink(missing_ok=True)  # of an earlier build


def with_extension():
    """What setup() needs to build kvb/_C.abi3.so: one file for every Python >= 3.10 and torch >= 2.10."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self):
            file = Path(self.build_lib, self.get_ext_filename("kvb._C"))
            file.unlink(missing_ok=True)  # of an earlier build
            try:
                super().run()
                if not file.exists():
                    raise RuntimeError("the compiler left no file")
            except Exception as error:  # of the compiler, distutils, ninja or torch
                do_without(f"it does not compile ({error})")
                # From here on this is a pure package; the wheel, if one is on its way, has to know.
                self.extensions = self.distribution.ext_modules = []
                wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
                if wheel:
                    wheel.root_is_pure = True

    flags = SANITIZERS[sanitize]
    # Instruction sets are chosen inside the sources; torch adds Py_LIMITED_API=0x030A0000 itself.
    extension = CppExtension(
        "kvb._C",
        sources,
        depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True),
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=[
            *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden", *EXACT_MATH),
            *(flags and [*flags, "-fno-omit-frame-pointer", "-g", "-O1"]),
        ],
        extra_link_args=[*EXACT_MATH, *flags],  # at link time -ffast-math would make the process flush subnormals
        py_limited_api=True,
    )
    extension.libraries = ["c10", "torch_cpu"]  # all that it calls
    return {
        "ext_modules": [extension],
        "cmdclass": arguments["cmdclass"] | {"build_ext": Build},
        "options": {
            "bdist_wheel": {"py_limited_api": "cp310"},
            "build": {"build_base": f"build/{sanitize and 'sanitize-' + sanitize}"},
        },
    }


if choice == "0":
    do_without("KVB_BUILD_EXT=0")
elif why := missing():
    do_without(why)
else:
    arguments |= with_extension()
setup(**arguments)
