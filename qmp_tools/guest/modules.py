"""The modules of a kernel: files of any distribution, what is built in, and the load order.

A folder with modules is ``lib/modules/VERSION`` of a distribution, which compresses modules in
several ways; a tree in which a kernel was built; or a folder that `Modules.pick` has filled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from .compression import decompress
from .drivers import CONFIG_OPTIONS

MODULE_TREES: Final = ("lib/modules", "usr/lib/modules")
"""The folders of a system that have a folder of modules for each kernel."""
_DEPENDENCIES: Final = "modules.dep"
_BUILT_IN: Final = "modules.builtin"
_LISTS: Final = (_DEPENDENCIES, _BUILT_IN, "modules.order")
"""Files that depmod or the kernel's build writes into a folder with modules."""


@dataclass(frozen=True)
class Modules:
    """The modules of the kernel `version`, in `folder`.

    Without a folder, only drivers that are built into the kernel can be used; a driver of which
    `config` says nothing is taken for one of these. `config` is the kernel's configuration, if it
    was found.
    """

    version: str
    folder: Path | None
    config: Path | None = None

    def load_order(self, wanted: Sequence[str]) -> dict[str, bytes]:
        """Return the `wanted` modules and their dependencies, each after its dependencies.

        Returns:
            The uncompressed modules by name. Modules that are built in are left out.

        Raises:
            UntestableError: the kernel has a module neither as a file nor built in, or a file
                cannot be decompressed.
        """
        order: dict[str, bytes] = {}

        def add(name: str) -> None:
            if name in order or self._is_built_in(name):
                return
            file = self._files.get(name)
            if file is None:
                raise UntestableError(self._explain_missing(name))
            content = _read(file)
            self._require_version(content, file)
            for dependency in _dependencies(content):
                add(dependency)
            order[name] = content

        for name in wanted:
            add(name)
        return order

    def pick(self, wanted: Sequence[str], target: Path) -> None:
        """Copy the `wanted` modules and their dependencies, uncompressed, into a new folder.

        The copy leaves out modules that this kernel does not have as files. The new folder can be
        the folder of other `Modules`: it also has the list of what is built in.
        """
        target.mkdir()
        (target / _BUILT_IN).write_text("".join(f"{name}.ko\n" for name in sorted(self._built_in)))
        left = list(wanted)
        while left:
            name = left.pop()
            copy = target / f"{name}.ko"
            if name not in self._files or copy.exists():
                continue
            copy.write_bytes(_read(self._files[name]))
            left += _dependencies(copy.read_bytes())

    def _require_version(self, module: bytes, file: Path) -> None:
        """Refuse a module of another kernel, which this kernel would not load (check_modinfo).

        The folder of this version may have modules of a compatible kernel (weak-updates).
        """
        match = re.search(rb"\0vermagic=(\S+)", module)
        built_for = match[1].decode(errors="replace") if match else self.version
        in_own_folder = self.folder is not None and self.folder.name == self.version
        # The version of an s390 kernel is only known from the name of its file.
        if built_for != self.version and self.version[:1].isdigit() and not in_own_folder:
            raise UntestableError(
                f"module {file} is for kernel {built_for}, and the kernel is {self.version}; give "
                "the folder with this kernel's modules with --modules DIR"
            )

    @cached_property
    def _files(self) -> dict[str, Path]:
        if self.folder is None:
            return {}
        try:
            listing = (self.folder / _DEPENDENCIES).read_text(errors="replace")
        except OSError:  # depmod writes the list when a kernel is installed, not in its package
            listing = ""
        # Of several modules with a name, such as a newer one in 'updates', depmod lists one.
        listed = [self.folder / line.partition(":")[0] for line in listing.splitlines()]
        return {_module(file.name): file for file in listed or self.folder.rglob("*.ko*")}

    @cached_property
    def _built_in(self) -> frozenset[str]:
        if self.folder is None or not exists(list_of_names := self.folder / _BUILT_IN):
            return frozenset()
        names = list_of_names.read_text(errors="replace").split()
        return frozenset(_module(Path(name).name) for name in names)

    def _is_built_in(self, name: str) -> bool:
        if name in self._built_in:
            return True
        configured = self._configured(name)
        return configured == "y" or (self.folder is None and configured is None)

    def _configured(self, name: str) -> str | None:
        """Return 'y', 'm' or 'n' for the option that builds a module; None if it is unknown."""
        option = CONFIG_OPTIONS.get(name)
        if option is None or self.config is None:
            return None
        try:
            content = self.config.read_text(errors="replace")
        except OSError:
            return None
        found = re.search(rf"^{option}=(\S+)$", content, re.MULTILINE)
        return found[1] if found else "n"

    def _explain_missing(self, name: str) -> str:
        option, value = CONFIG_OPTIONS.get(name), self._configured(name)
        where = (
            f"{self.folder} has neither a file for it nor a line in {_BUILT_IN}"
            if self.folder is not None
            else "no folder with its modules was found or given"
        )
        if value == "m":
            where += f"; {self.config} has {option}=m"
            remedy = (
                "use a folder that has the module: some distributions have it in a further "
                "package, such as linux-modules-extra or kernel-modules-extra"
                if self.folder is not None
                else "give the folder with --modules DIR"
            )
        elif value == "n":
            where += f"; {option} is not set in {self.config}"
            remedy = f"use a kernel with {option}=m or {option}=y"
        elif self.folder is not None and not exists(self.folder / _BUILT_IN):
            remedy = (
                f"copy {_BUILT_IN}, which names the drivers that are built in, from the kernel's "
                "build or package into that folder"
            )
        elif option is not None:
            remedy = f"use a kernel with {option}=m or {option}=y"
        else:
            remedy = "use a kernel whose modules are complete"
        return f"the kernel {self.version} has no module {name}: {where}; {remedy}"


def find_modules(version: str, image: Path, given: Path | None) -> Modules:
    """Find the modules and the configuration of the kernel `version`.

    Args:
        version: the kernel's release (``uname -r``).
        image: the kernel's file. Without `given`, the modules are searched in the folders above the
            file, in the way in which systems, packages and build trees have them.
        given: the folder with the modules, or a folder above ``lib/modules/VERSION``.

    Returns:
        The modules; their folder is None if none was found.
    """
    tops = image.absolute().parents if given is None else [given.absolute()]
    folders = (folder for top in tops for folder in _places(top, version) if _has_modules(folder))
    folder = next(folders, None)
    places = [image.parent / f"config-{version}", Path(f"/boot/config-{version}")]
    if folder is not None:
        places = [*(folder / name for name in ("config", ".config", "build/.config")), *places]
    return Modules(version, folder, next(filter(exists, places), None))


def _places(top: Path, version: str) -> Iterator[Path]:
    yield top
    yield top / version
    for tree in MODULE_TREES:
        yield top / tree / version


def _has_modules(folder: Path) -> bool:
    try:
        return any(exists(folder / name) for name in _LISTS) or any(folder.glob("*.ko*"))
    except PermissionError:
        return False


def exists(file: Path) -> bool:
    """Return whether this user can see the regular file."""
    try:
        return file.is_file()
    except OSError:  # a folder of its path may not be entered
        return False


def _read(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UntestableError(
            f"module {file}: {error.strerror}; install the kernel's modules again, or give another "
            "folder with --modules DIR"
        ) from error
    return content if file.suffix == ".ko" else decompress(content, f"module {file}")


def _module(file_name: str) -> str:
    """Return a module's name: file names may have '-' where names have '_'."""
    return file_name.partition(".")[0].replace("-", "_")


def _dependencies(module: bytes) -> list[str]:
    """Return the dependencies of an uncompressed module, from its .modinfo section."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    names = match[1].decode(errors="replace").split(",") if match else []
    return [_module(name) for name in names if name]
