"""The options of one proof: `ProofOptions`, the single description of them.

The command line, matrix files, avocado's parameters and the pytest fixture all derive their options
from `OPTIONS`. A new option is a new field of the class, and a line where it takes effect
(`resolve`). The `DeviceKind`s of `devices.registry` say which options each kind accepts.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import wraps
from typing import (
    Annotated,
    Any,
    Concatenate,
    Final,
    Literal,
    ParamSpec,
    Protocol,
    Self,
    TypeAlias,
    TypeVar,
    get_args,
    get_type_hints,
    overload,
)

from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.errors import UsageError

from ..arch import ARCHITECTURES
from ..arguments import AnyPath, positive, require, seconds, size, whole
from ..arguments import timeout as bound
from ..devices.emulated import RINGS
from ..guest.choice import GUESTS
from ..host.timeout import DEFAULT_TIMEOUT_S
from ..migration.migration import Limits
from ..migration.refused_features import FEATURES
from ..migration.scenarios import known_scenarios
from ..migration.settings import parse_parameters, require_capabilities
from ..migration.transport import LOCALHOST
from ..qemu.machine import KIB, format_memory, parse_memory
from ..qemu.memory_backend import KINDS as MEMORY_KINDS
from ..qemu.memory_backend import parse_memory_backend
from .late_dma import SETTLE_S

P = ParamSpec("P")
S = TypeVar("S")
T_co = TypeVar("T_co", covariant=True)

Read: TypeAlias = Callable[[object], Any]
"""Converts a given value, or its text, to the option's value; its ValueError names what it
expected."""

GUEST_PAGES: Final = {"4K": 4 * KIB, "16K": 16 * KIB, "64K": 64 * KIB}
"""The values of ``--guest-pages``, in bytes."""
MOST_NODES: Final = 8
"""As in guests/linux/init.c."""
ACCELERATORS: Final = ("auto", "kvm", "tcg")


def _text(given: object) -> str:
    if not isinstance(given, str):
        raise ValueError("a string")
    return given


def _path(given: object) -> str:
    if not isinstance(given, (str, os.PathLike)):
        raise ValueError("a path")
    return str(os.fspath(given))


def _memory(given: object) -> int:
    return given if isinstance(given, int) else parse_memory(str(given))


def _memory_backend(given: object) -> str:
    text = _text(given)
    parse_memory_backend(text)
    return text


def _nodes(given: object) -> int:
    nodes = whole(given)
    if not 1 <= nodes <= MOST_NODES:
        raise ValueError(f"1 to {MOST_NODES} nodes")
    return nodes


def _downtime(given: object) -> float:
    try:
        value = bound(given)
    except ValueError:
        value = 0.0
    if not 0.001 <= value <= 2000:  # QEMU takes whole milliseconds, and at most 2000 s
        raise ValueError("0.001 to 2000 seconds")
    return value


def _harvest(given: object) -> float | str:
    if given in ("immediate", "final"):
        return str(given)
    try:
        return seconds(given)
    except ValueError:
        raise ValueError("seconds (more than 0, less than 3600), immediate or final") from None


def _switch(given: object) -> bool:
    value = {"on": True, "true": True, "off": False, "false": False}.get(str(given).lower())
    if value is None:
        raise ValueError("on or off")
    return value


def _iommus() -> list[str]:
    return [name for each in ARCHITECTURES.values() for name in each.iommus]


def _several(given: object) -> tuple[str, ...]:
    """Return the values of a list, or of a text in which blanks separate them."""
    if isinstance(given, str):
        return tuple(given.split())
    if not isinstance(given, Collection) or not all(isinstance(value, str) for value in given):
        raise ValueError("a name, or a list of names")
    return tuple(given)


def _capabilities(given: object) -> tuple[str, ...]:
    names = _several(given)
    require_capabilities(names)
    return names


def _parameters(given: object) -> tuple[str, ...]:
    texts = _several(given)
    parse_parameters(texts)
    return texts


@dataclass(frozen=True)
class Option:
    """How a field of `ProofOptions` is read, written and explained.

    `choices` returns the names that the option can have, if there is a list of them. The names may
    be those of plugins, so they are looked up only when they are needed.
    """

    group: str
    help: str
    metavar: str | None = None
    read: Read = _text
    write: Callable[[Any], str] = str
    choices: Callable[[], Collection[str]] | None = None
    name: str = field(default="", kw_only=True)
    default: Any = field(default=None, kw_only=True)

    @property
    def flag(self) -> str:
        """The name of the option of ``dmaproof prove``: '--kill-device'."""
        return f"--{self.key}"

    @property
    def key(self) -> str:
        """The name in matrices and their files: 'kill-device'."""
        return self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether the option is a switch, which is on or off."""
        return self.read is _switch

    @property
    def is_repeatable(self) -> bool:
        """Whether the option can have several values at once."""
        return isinstance(self.default, tuple)

    @property
    def values(self) -> list[str]:
        """The texts of all possible values; empty where they cannot be listed."""
        if self.is_switch:
            return ["off", "on"]
        return list(self.choices()) if self.choices is not None else []

    def value_of(self, given: object) -> Any:
        """Return the value for which `given`, a value or its text, stands.

        Raises:
            UsageError: the option cannot have this value.
        """
        try:
            value = self.read(given)
        except ValueError as error:
            raise UsageError(f"{self.flag}: expected {error}, got {given!r}") from None
        if self.choices is not None:
            for name in value if self.is_repeatable else (value,):
                if name not in self.choices():
                    raise UsageError(
                        f"{self.flag}: expected one of {', '.join(self.choices())}, got {name!r}"
                    )
        return value

    def words(self, value: Any) -> list[str]:
        """Return the words of a command line that give the option this `value`."""
        if self.is_switch:
            return [self.flag] if value else []
        values = value if self.is_repeatable else [value]
        return [f"{self.flag}={self.write(each)}" for each in values]


@dataclass(frozen=True, kw_only=True)
class ProofOptions:
    """The options of a proof; dmaproof chooses the value of an option that is None.

    Sizes are in bytes and times in seconds. Each value can also be the text that the command line
    takes: ``ProofOptions(memory="1G", harvest="immediate")``.

    ::

        options = ProofOptions(guest="bare", tracker="dirty-ring", scenario="tls")

    Raises:
        UsageError: an option cannot have its value; the message names both.
    """

    arch: Annotated[
        str | None,
        Option(
            "QEMU",
            "guest's architecture (default: host's)",
            choices=lambda: ARCHITECTURES,
        ),
    ] = None
    qemu: Annotated[
        AnyPath | None,
        Option(
            "QEMU",
            "path of QEMU, or version of a fetched one (default: the system's)",
            "PATH",
            _path,
        ),
    ] = None
    qemu_destination: Annotated[
        AnyPath | None,
        Option("QEMU", "QEMU of the destination (default: as --qemu)", "PATH", _path),
    ] = None
    l1_kernel: Annotated[
        str | None,
        Option(
            "QEMU",
            "the nested machine's kernel (default: 7.3)",
            "VERSION",
        ),
    ] = None
    machine: Annotated[
        str | None,
        Option("QEMU", "machine type (default: as needed)", "NAME"),
    ] = None
    accel: Annotated[
        Literal["auto", "kvm", "tcg"],
        Option(
            "QEMU",
            "accelerator; auto: KVM if it runs the guest, else TCG",
            choices=lambda: ACCELERATORS,
        ),
    ] = "auto"
    memory: Annotated[
        int | str | None,
        Option(
            "QEMU",
            "guest RAM, such as 1G (default: as needed)",
            "SIZE",
            _memory,
            format_memory,
        ),
    ] = None
    memory_backend: Annotated[
        str,
        Option(
            "QEMU",
            f"{', '.join(MEMORY_KINDS)} or file:FOLDER",
            "KIND",
            _memory_backend,
        ),
    ] = "memfd"
    numa: Annotated[
        int | None,
        Option(
            "QEMU",
            "number of NUMA nodes (default: none)",
            "N",
            _nodes,
        ),
    ] = None
    cpus: Annotated[int, Option("QEMU", "number of virtual CPUs", "N", positive)] = 2
    iommu: Annotated[
        str | None,
        Option(
            "QEMU",
            "QEMU's IOMMU in front of the devices (default: none, or what the fault needs)",
            choices=_iommus,
        ),
    ] = None
    guest: Annotated[
        str,
        Option("guest", "guest to run; bare: no kernel, one CPU", choices=lambda: sorted(GUESTS)),
    ] = "linux"
    guest_pages: Annotated[
        str | None,
        Option(
            "guest",
            "size of Linux's pages (default: the kernel's)",
            choices=lambda: GUEST_PAGES,
        ),
    ] = None
    workload: Annotated[
        str,
        Option(
            "guest",
            "what the guest does, such as pattern=hot-set (default: see 'dmaproof list workload')",
            "NAME=VALUE,…",
        ),
    ] = ""
    kernel: Annotated[
        AnyPath | None,
        Option(
            "guest",
            "kernel of --guest linux, or of your own for vfio:… (default: host's or packaged)",
            "FILE",
            _path,
        ),
    ] = None
    modules: Annotated[
        AnyPath | None,
        Option(
            "guest",
            "modules of that kernel (default: beside FILE)",
            "DIR",
            _path,
        ),
    ] = None
    initrd: Annotated[
        AnyPath | None,
        Option("guest", "initramfs for vfio:… (default: none)", "FILE", _path),
    ] = None
    append: Annotated[str, Option("guest", "command line for vfio:… (default: empty)", "TEXT")] = ""
    scenario: Annotated[
        str,
        Option("migration", "how the guest migrates", "NAME", choices=known_scenarios),
    ] = "unix"
    capability: Annotated[
        str | Sequence[str],
        Option(
            "migration",
            "QEMU's migration capability to enable too; may be repeated (default: none)",
            "NAME",
            _capabilities,
        ),
    ] = ()
    parameter: Annotated[
        str | Sequence[str],
        Option(
            "migration",
            "QEMU's migration parameter to set; VALUE is JSON or a string; may be repeated "
            "(default: none)",
            "NAME=VALUE",
            _parameters,
        ),
    ] = ()
    host: Annotated[str, Option("migration", "address for tcp and tls", "ADDRESS")] = LOCALHOST
    bandwidth: Annotated[
        int | str | None,
        Option("migration", "bytes/s, such as 64M (default: no limit)", "SIZE", size),
    ] = None
    downtime_limit: Annotated[
        float, Option("migration", "QEMU's downtime-limit", "SECONDS", _downtime)
    ] = 0.3
    max_downtime: Annotated[
        float | None,
        Option(
            "migration",
            "fail above this downtime (default: no limit)",
            "SECONDS",
            seconds,
        ),
    ] = None
    timeout: Annotated[
        float,
        Option(
            "migration",
            "longest single wait",
            "SECONDS",
            bound,
        ),
    ] = DEFAULT_TIMEOUT_S
    device: Annotated[
        str | Sequence[str],
        Option(
            "device",
            "device that writes the guest's RAM; may be repeated",
            "NAME[:OPTION=VALUE,…]",
            _several,
        ),
    ] = ("blk",)
    device_command: Annotated[
        str | None,
        Option(
            "device",
            "vhost-user back end to run instead of dmaproof's; {socket}, {image}, {folder}, {side} "
            "and {queues} are filled in (default: dmaproof's own)",
            "COMMAND",
        ),
    ] = None
    queues: Annotated[int, Option("device", "number of virtqueues", "N", positive)] = 2
    ring: Annotated[
        Literal["split", "packed"],
        Option("device", "form of the virtqueues", choices=lambda: RINGS),
    ] = "split"
    tracker: Annotated[
        str | None,
        Option(
            "device",
            "how the device remembers dirty pages (default: what the fault needs, or iommu)",
            "NAME",
            choices=lambda: sorted(emulated_trackers()),
        ),
    ] = None
    harvest: Annotated[
        float | Literal["immediate", "final"] | None,
        Option(
            "device",
            "time between two harvests of the tracker, or 'immediate' (after each write), or "
            "'final' (default: what the fault needs, or 0.2)",
            "SECONDS",
            _harvest,
        ),
    ] = None
    fault: Annotated[
        str | None,
        Option("device", "break one link of the chain (default: none)", "NAME[=VALUE]"),
    ] = None
    destination_lacks: Annotated[
        str | Sequence[str],
        Option(
            "device",
            "virtio feature that only the source's device offers, which QEMU must refuse; may be "
            "repeated (default: none)",
            "FEATURE",
            _several,
            choices=lambda: FEATURES,
        ),
    ] = ()
    kill_device: Annotated[
        bool,
        Option(
            "device",
            "kill and restart the device in the migration",
            read=_switch,
        ),
    ] = False
    kill_destination_device: Annotated[
        bool,
        Option(
            "device",
            "kill and restart the destination's device",
            read=_switch,
        ),
    ] = False
    seed: Annotated[
        int | None,
        Option("proof", "seed, to repeat a run (default: random)", "N", whole),
    ] = None
    requests_after: Annotated[
        int, Option("proof", "requests that the guest must complete afterwards", "N", positive)
    ] = 1000
    settle: Annotated[
        float,
        Option(
            "proof",
            "how long a third-party device must not write after the guest was paused",
            "SECONDS",
            seconds,
        ),
    ] = SETTLE_S

    def __post_init__(self) -> None:
        for option in OPTIONS.values():
            given = getattr(self, option.name)
            if given is not None or option.default is not None:
                object.__setattr__(self, option.name, option.value_of(given))

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """Return the options of these names, with hyphens or underscores, as values or as text.

        An option that is None has its default. A switch is True or 'on', False or 'off'. An option
        that may be repeated has its values in a list, or in a text in which blanks separate them.

        Raises:
            UsageError: an option does not exist, or cannot have the value.
        """
        require("options", options, Mapping, "options by name, such as {'guest': 'bare'}")
        chosen: dict[str, Any] = {}
        for name, value in options.items():
            require("options", name, str, "names that are strings")
            chosen[find_option(name).name] = value
        return cls(**{name: value for name, value in chosen.items() if value is not None})

    @property
    def memory_bytes(self) -> int | None:
        """The guest's RAM in bytes, as `memory` gives it."""
        return None if self.memory is None else _memory(self.memory)

    @property
    def limits(self) -> Limits:
        """The bounds of the migration."""
        bandwidth = None if self.bandwidth is None else size(self.bandwidth)
        return Limits(bandwidth, self.downtime_limit, self.timeout)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The names in `capability`, one or several."""
        return _several(self.capability)

    @property
    def parameters(self) -> dict[str, Any]:
        """The values in `parameter`, by name."""
        return parse_parameters(_several(self.parameter))

    @property
    def devices(self) -> tuple[str, ...]:
        """The names in `device`, one or several."""
        return _several(self.device)

    @property
    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        return {
            name: getattr(self, name)
            for name, option in OPTIONS.items()
            if getattr(self, name) != option.default
        }

    def words(self) -> list[str]:
        """Return the options as words of a command line, without those that have their default.

        ::

            ProofOptions(guest="bare", memory="1G").words()  # ['--memory=1G', '--guest=bare']
        """
        return [word for name, value in self.changed.items() for word in OPTIONS[name].words(value)]

    def to_json(self) -> dict[str, Any]:
        """Return all options by name, as JSON has them; `of` reads them again."""
        return asdict(self)


def find_option(name: str) -> Option:
    """Return the option of this name, with hyphens or underscores.

    Raises:
        UsageError: the option does not exist.
    """
    found = OPTIONS.get(name.replace("-", "_"))
    if found is None:
        known = ", ".join(option.key for option in OPTIONS.values())
        raise UsageError(f"{name} is not an option of a proof; expected one of {known}")
    return found


def _described() -> dict[str, Option]:
    hints = get_type_hints(ProofOptions, include_extras=True)
    found = {}
    for each in fields(ProofOptions):
        option: Option = get_args(hints[each.name])[1]
        default = None if each.default is MISSING else each.default
        found[each.name] = replace(option, name=each.name, default=default)
    return found


OPTIONS: Final[Mapping[str, Option]] = _described()
"""The options of a proof by the name of their field, in the order of the fields."""


class TakesOptions(Protocol[P, T_co]):
    """A function that takes the options of a proof: `ProofOptions`, or its fields as keywords."""

    @overload
    def __call__(self, options: ProofOptions, /) -> T_co: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T_co: ...


def options_as_keywords(
    options: Callable[P, ProofOptions],
) -> Callable[[Callable[[ProofOptions], T_co]], TakesOptions[P, T_co]]:
    """Let a function of `ProofOptions` take the options as its own keyword arguments, too.

    `options` is always the class `ProofOptions`: from it a type checker knows each keyword.
    """

    def decorate(function: Callable[[ProofOptions], T_co]) -> TakesOptions[P, T_co]:
        @wraps(function)
        def taking_keywords(*given: Any, **options: Any) -> T_co:
            if not given:
                return function(ProofOptions.of(options))
            require("options", given[0], ProofOptions, "ProofOptions, or keywords such as guest=")
            if options or given[1:]:
                raise UsageError("options: expected either ProofOptions or keywords, got both")
            return function(given[0])

        return taking_keywords

    return decorate


def options_as_keywords_of_method(
    options: Callable[P, ProofOptions],
) -> Callable[[Callable[[S, ProofOptions], T_co]], Callable[Concatenate[S, P], T_co]]:
    """Let a method of `ProofOptions` take the options as its keyword arguments instead."""

    def decorate(method: Callable[[S, ProofOptions], T_co]) -> Callable[Concatenate[S, P], T_co]:
        @wraps(method)
        def taking_keywords(self: S, /, *_: P.args, **options: P.kwargs) -> T_co:
            return method(self, ProofOptions.of(options))

        return taking_keywords

    return decorate
