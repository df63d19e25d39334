"""What one proof is to be: `ProofOptions`, the single description of a proof.

Command line, matrix file, avocado parameters and pytest fixture are views of it: each derives its
options from `OPTIONS`. A new option is a new field of the class, and a line where it takes effect
(`resolve`). Which options a kind of device accepts is said by its entry in `devices.registry`.
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

from ..arguments import AnyPath, positive, require, seconds, size, whole
from ..arguments import timeout as bound
from ..devices.emulated import RINGS
from ..guest.choice import GUESTS
from ..host.timeout import DEFAULT_TIMEOUT_S
from ..migration.migration import Limits
from ..migration.refused_features import FEATURES
from ..migration.scenarios import known_scenarios
from ..migration.transport import LOCALHOST
from ..qemu.iommu import IOMMUS
from ..qemu.machine import format_memory, parse_memory
from .late_dma import SETTLE_S

P = ParamSpec("P")
S = TypeVar("S")
T_co = TypeVar("T_co", covariant=True)

Read: TypeAlias = Callable[[object], Any]
"""Makes an option's value of what was given, a value or its text; a ValueError says what else it
expected."""

ACCELERATORS: Final = ("auto", "kvm", "tcg")


def _text(given: object) -> str:
    if not isinstance(given, str):
        raise ValueError("a text")
    return given


def _path(given: object) -> str:
    if not isinstance(given, (str, os.PathLike)):
        raise ValueError("a path")
    return str(os.fspath(given))


def _memory(given: object) -> int:
    return given if isinstance(given, int) else parse_memory(str(given))


def _downtime(given: object) -> float:
    try:
        value = bound(given)
    except ValueError:
        value = 0.0
    if not 0.001 <= value <= 2000:  # QEMU counts it in milliseconds
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


def _several(given: object) -> tuple[str, ...]:
    """Several values: of a list, or of a text with blanks between them."""
    if isinstance(given, str):
        return tuple(given.split())
    if not isinstance(given, Collection) or not all(isinstance(it, str) for it in given):
        raise ValueError("a name, or a list of names")
    return tuple(given)


@dataclass(frozen=True)
class Option:
    """How a field of `ProofOptions` is read, written and explained.

    `choices` are the names that it can have, if there is a list of them; they may be those of
    plugins, so they are looked up when they are asked for.
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
        """The option of ``dmaproof prove``: '--kill-device'."""
        return f"--{self.key}"

    @property
    def key(self) -> str:
        """Its name in matrices and their files: 'kill-device'."""
        return self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return self.read is _switch

    @property
    def is_repeatable(self) -> bool:
        """Whether it can have several values at once."""
        return self.read is _several

    @property
    def values(self) -> list[str]:
        """The texts of all values that it can have; none where there is no list of them."""
        if self.is_switch:
            return ["off", "on"]
        return list(self.choices()) if self.choices is not None else []

    def value_of(self, given: object) -> Any:
        """The value that `given`, a value or its text, stands for.

        Raises:
            UsageError: the option cannot have it.
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
        """The words of a command line that give the option this `value`."""
        if self.is_switch:
            return [self.flag] if value else []
        return [
            f"{self.flag}={self.write(it)}" for it in (value if self.is_repeatable else [value])
        ]


@dataclass(frozen=True, kw_only=True)
class ProofOptions:
    """Everything that a proof can be asked to be; what is None is chosen for you.

    Sizes are in bytes and times in seconds. Whatever can be text on the command line can be the
    same text here: ``ProofOptions(memory="1G", harvest="immediate")``.

    ::

        options = ProofOptions(guest="bare", tracker="dirty-ring", scenario="tls")

    Raises:
        UsageError: an option cannot have its value; the message names both.
    """

    qemu: Annotated[
        AnyPath | None,
        Option("QEMU", "default: the system's; or a fetched version", "PATH", _path),
    ] = None
    qemu_destination: Annotated[
        AnyPath | None, Option("QEMU", "default: the same as --qemu", "PATH", _path)
    ] = None
    machine: Annotated[
        str | None,
        Option("QEMU", "machine type (default: q35, or what the scenario needs)", "NAME"),
    ] = None
    accel: Annotated[
        Literal["auto", "kvm", "tcg"],
        Option("QEMU", "auto: KVM if it runs the guest", choices=lambda: ACCELERATORS),
    ] = "auto"
    memory: Annotated[
        int | str | None,
        Option(
            "QEMU",
            "RAM, such as 1G (default: enough for the guest)",
            "SIZE",
            _memory,
            format_memory,
        ),
    ] = None
    cpus: Annotated[int, Option("QEMU", "virtual CPUs of the guest", "N", positive)] = 2
    iommu: Annotated[
        str | None,
        Option(
            "QEMU",
            "put the devices behind an IOMMU of QEMU's, see below (default: none, or what the "
            "fault needs)",
            choices=lambda: IOMMUS,
        ),
    ] = None
    guest: Annotated[
        str, Option("guest", "bare: no kernel, one CPU", choices=lambda: sorted(GUESTS))
    ] = "linux"
    workload: Annotated[
        str,
        Option(
            "guest",
            "what the guest does, see docs/guests.md: such as pattern=hot-set,threads=16",
            "NAME=VALUE,…",
        ),
    ] = ""
    kernel: Annotated[
        AnyPath | None,
        Option("guest", "what QEMU's -kernel takes, for --device vfio:…", "FILE", _path),
    ] = None
    initrd: Annotated[AnyPath | None, Option("guest", "its initramfs", "FILE", _path)] = None
    append: Annotated[str, Option("guest", "its command line", "TEXT")] = ""
    scenario: Annotated[
        str,
        Option("migration", "how the guest migrates, see below", "NAME", choices=known_scenarios),
    ] = "unix"
    host: Annotated[
        str, Option("migration", "where the scenarios tcp and tls listen", "ADDRESS")
    ] = LOCALHOST
    bandwidth: Annotated[
        int | str | None,
        Option("migration", "limit in bytes a second, such as 64M", "SIZE", size),
    ] = None
    downtime_limit: Annotated[
        float, Option("migration", "what QEMU may stop the guest for", "SECONDS", _downtime)
    ] = 0.3
    max_downtime: Annotated[
        float | None,
        Option(
            "migration",
            "fail where the guest is stopped for longer, until the destination has loaded "
            "everything; QEMU itself is told --downtime-limit",
            "SECONDS",
            seconds,
        ),
    ] = None
    timeout: Annotated[
        float,
        Option(
            "migration",
            "how long to wait for any one thing, such as an answer or the end of a migration",
            "SECONDS",
            bound,
        ),
    ] = DEFAULT_TIMEOUT_S
    device: Annotated[
        str | Sequence[str],
        Option(
            "device",
            "one of dmaproof's (docs/built-in-devices.md), may come repeatedly; qemu:NAME, one inside "
            "QEMU (docs/third-party-devices.md); vfio-fake, or vfio:SOURCE,DESTINATION (docs/passthrough.md)",
            "NAME[:OPTION=VALUE,…]",
            _several,
        ),
    ] = ("blk",)
    device_command: Annotated[
        str | None,
        Option(
            "device",
            "a vhost-user back end to be run in the device's place, listening on {socket}; "
            "{image}, {folder}, {side} and {queues} are filled in too",
            "COMMAND",
        ),
    ] = None
    queues: Annotated[int, Option("device", "virtqueues of the device", "N", positive)] = 2
    ring: Annotated[
        Literal["split", "packed"],
        Option("device", "form of its queues", choices=lambda: RINGS),
    ] = "split"
    tracker: Annotated[
        str | None,
        Option(
            "device",
            "how the device remembers what it wrote (default: what the fault needs, or iommu)",
            choices=lambda: sorted(emulated_trackers()),
        ),
    ] = None
    harvest: Annotated[
        float | Literal["immediate", "final"] | None,
        Option(
            "device",
            "between two harvests of the tracker, or 'immediate', or 'final' (default: what the "
            "fault needs, or 0.2)",
            "SECONDS",
            _harvest,
        ),
    ] = None
    fault: Annotated[
        str | None,
        Option("device", "break the chain on purpose; see below", "NAME[=VALUE]"),
    ] = None
    destination_lacks: Annotated[
        str | Sequence[str],
        Option(
            "device",
            "a virtio feature that the device offers at the source alone, which QEMU has to "
            "refuse; may come repeatedly",
            "FEATURE",
            _several,
            choices=lambda: FEATURES,
        ),
    ] = ()
    kill_device: Annotated[
        bool,
        Option(
            "device",
            "kill its process in the middle of the migration, and start it again",
            read=_switch,
        ),
    ] = False
    seed: Annotated[int | None, Option("proof", "repeats a run's random choices", "N", whole)] = (
        None
    )
    requests_after: Annotated[
        int, Option("proof", "that the guest must do on the destination", "N", positive)
    ] = 1000
    settle: Annotated[
        float,
        Option(
            "proof",
            "how long a third-party device must leave the source's RAM alone after its guest was "
            "paused",
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
        """The options of these names, with hyphens or underscores, as values or as text.

        One that is None is not given. A switch is True or 'on', False or 'off'. What may come
        repeatedly has its values in a list, or in a text with blanks between them.

        Raises:
            UsageError: there is no such option, or it cannot have that value.
        """
        require("options", options, Mapping, "options by name, such as {'guest': 'bare'}")
        chosen: dict[str, Any] = {}
        for name, value in options.items():
            require("options", name, str, "names that are strings")
            chosen[find_option(name).name] = value
        return cls(**{name: value for name, value in chosen.items() if value is not None})

    @property
    def memory_bytes(self) -> int | None:
        """The guest's RAM that `memory` asks for."""
        return None if self.memory is None else _memory(self.memory)

    @property
    def limits(self) -> Limits:
        """What the migration may take."""
        bandwidth = None if self.bandwidth is None else size(self.bandwidth)
        return Limits(bandwidth, self.downtime_limit, self.timeout)

    @property
    def devices(self) -> tuple[str, ...]:
        """What `device` names, one or several."""
        return _several(self.device)

    @property
    def changed(self) -> dict[str, Any]:
        """The options that are not as they are by default, by name."""
        return {
            name: getattr(self, name)
            for name, option in OPTIONS.items()
            if getattr(self, name) != option.default
        }

    def words(self) -> list[str]:
        """The options as words of a command line; those that are as by default are left out.

        ::

            ProofOptions(guest="bare", memory="1G").words()  # ['--memory=1G', '--guest=bare']
        """
        return [word for name, value in self.changed.items() for word in OPTIONS[name].words(value)]

    def to_json(self) -> dict[str, Any]:
        """All options by name, as JSON has them; `of` takes them back."""
        return asdict(self)


def find_option(name: str) -> Option:
    """The option of this name, with hyphens or underscores.

    Raises:
        UsageError: there is no such option.
    """
    found = OPTIONS.get(name.replace("-", "_"))
    if found is None:
        known = ", ".join(option.key for option in OPTIONS.values())
        raise UsageError(f"{name} is not an option of a proof; expected one of {known}")
    return found


def _described() -> dict[str, Option]:
    hints = get_type_hints(ProofOptions, include_extras=True)
    found = {}
    for it in fields(ProofOptions):
        option: Option = get_args(hints[it.name])[1]
        default = None if it.default is MISSING else it.default
        found[it.name] = replace(option, name=it.name, default=default)
    return found


OPTIONS: Final[Mapping[str, Option]] = _described()
"""The options of a proof by the name of their field, in their order."""


class TakesOptions(Protocol[P, T_co]):
    """A function of the options of a proof: of `ProofOptions`, or of its fields as keywords."""

    @overload
    def __call__(self, options: ProofOptions, /) -> T_co: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T_co: ...


def options_as_keywords(
    options: Callable[P, ProofOptions],
) -> Callable[[Callable[[ProofOptions], T_co]], TakesOptions[P, T_co]]:
    """Let a function of `ProofOptions` take the options as its own keyword arguments, too.

    A type checker then knows the name and type of each: pass `ProofOptions` itself.
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
