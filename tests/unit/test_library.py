"""The library's public API: `blocking` returns no awaitable, and wrong types are refused."""

from __future__ import annotations

import asyncio
import inspect
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from dmaproof.errors import UsageError
from qmp_tools import aio, arguments, blocking
from qmp_tools.proof.options import ProofOptions


def _functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the public functions of `blocking` by name, and the methods of its classes."""
    for name, value in vars(blocking).items():
        if not name.startswith("_") and inspect.isroutine(value):
            yield name, value
    for name in blocking.__all__:
        value = getattr(blocking, name)
        if not inspect.isclass(value):
            continue
        for member, found in inspect.getmembers_static(value):
            function = found
            if isinstance(found, property):
                function = found.fget
            elif isinstance(found, cached_property):
                function = found.func
            if not member.startswith("_") and inspect.isfunction(function):
                yield f"{name}.{member}", function


FUNCTIONS = dict(_functions())


def test_the_functions_of_blocking_are_found() -> None:
    assert {"check", "prove", "Environment.check", "Pair.migrate", "RunningQemu.execute"} <= set(
        FUNCTIONS
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_function_of_blocking_returns_an_awaitable(name: str) -> None:
    function = FUNCTIONS[name]
    assert not inspect.iscoroutinefunction(function)
    assert not inspect.isasyncgenfunction(function)
    if function.__module__ == blocking.__name__:
        returned = typing.get_type_hints(function)["return"]
        kind = typing.get_origin(returned) or returned
        assert not (inspect.isclass(kind) and issubclass(kind, (Awaitable, AsyncIterator)))


async def _enter(context: Any) -> None:
    async with context:
        pytest.fail("the context was entered")


async def _first(items: AsyncIterator[object]) -> None:
    await anext(items)


SOCKET = Path("/no/such/socket")
ANY_QEMU = (
    "expected the path of a QMP socket, the URI of a libvirt domain, or an object with a method "
    "cmd() or execute(), such as a QEMUMachine"
)
CALLS: Mapping[str, tuple[Callable[[], Coroutine[Any, Any, object]], str]] = {
    "check": (lambda: aio.check(1, SOCKET), f"source: {ANY_QEMU}, got 1 (int)"),  # type: ignore[arg-type]
    "check, second": (
        lambda: aio.check(str(SOCKET), None),  # type: ignore[arg-type]
        f"destination: {ANY_QEMU}, got None (NoneType)",
    ),
    "attach": (
        lambda: _enter(aio.attach("a QEMU", b"/run/x")),  # type: ignore[arg-type]
        f"a QEMU: {ANY_QEMU}, got b'/run/x' (bytes)",
    ),
    "attach, timeout_s": (
        lambda: _enter(aio.attach("a QEMU", SOCKET, timeout_s="1")),  # type: ignore[arg-type]
        "timeout_s: expected seconds, got '1' (str)",
    ),
    "prove": (
        lambda: aio.prove("guest=bare"),  # type: ignore[call-overload]
        "options: expected ProofOptions, or keywords such as guest=, got 'guest=bare' (str)",
    ),
    "start_qemu, one string": (
        lambda: _enter(aio.start_qemu("-m 64")),
        "arguments: expected a list of words, such as ['-m', '64'], got the string '-m 64'",
    ),
    "start_qemu, a number": (
        lambda: _enter(aio.start_qemu(["-m", 64])),  # type: ignore[list-item]
        "arguments[1]: expected a word, got 64 (int)",
    ),
    "start_qemu, binary": (
        lambda: _enter(aio.start_qemu(binary=7.2)),  # type: ignore[arg-type]
        "binary: expected a path, got 7.2 (float)",
    ),
    "start_qemu, accelerator": (
        lambda: _enter(aio.start_qemu(accelerator=True)),  # type: ignore[arg-type]
        "accelerator: expected a name, such as 'tcg', got True (bool)",
    ),
    "migrate": (
        lambda: _first(aio.migrate("a", "b")),  # type: ignore[arg-type]
        "source: expected a QEMU from start_qemu(), or attach() with a socket, got 'a' (str)",
    ),
    "watch": (
        lambda: _first(aio.watch("a", 1.0)),  # type: ignore[arg-type]
        "qemu: expected a QEMU from start_qemu() or attach(), got 'a' (str)",
    ),
    "measure_dirty_rate": (
        lambda: aio.measure_dirty_rate("a", "page-sampling", 1),  # type: ignore[arg-type]
        "qemu: expected a QEMU from start_qemu() or attach(), got 'a' (str)",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_type_is_wrong_usage(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises(UsageError) as caught:
        asyncio.run(call())
    assert str(caught.value) == message


def test_paths_may_be_strings() -> None:
    for path in (SOCKET, str(SOCKET)):
        with pytest.raises(UsageError, match=str(SOCKET)):
            asyncio.run(_enter(aio.attach("a QEMU", path)))
    assert arguments.words_of("arguments", ("-kernel", SOCKET)) == ["-kernel", str(SOCKET)]


def test_the_name_of_an_option_must_be_a_string() -> None:
    with pytest.raises(UsageError, match="options: expected names that are strings, got 1"):
        ProofOptions.of({1: "bare"})  # type: ignore[dict-item]
