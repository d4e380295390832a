"""The C control surface of the simulator, typed.

Invariant: the structures and signatures here equal those of ``csrc/state.h`` and ``csrc/control.cpp``; nothing else in
the package calls into the library by ctypes.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


class TraceRecord(ctypes.Structure):
    """One kernel or copy on a stream's time line. Times in seconds."""

    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("stream", ctypes.c_int64),
        ("start", ctypes.c_double),
        ("end", ctypes.c_double),
        ("bytes", ctypes.c_int64),
        ("flops", ctypes.c_double),
    )


class CopyRecord(ctypes.Structure):
    """One copy between host and device. Times in seconds, sizes and offsets in bytes."""

    _fields_ = (
        ("to_device", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("host_address", ctypes.c_int64),
        ("storage", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("stream", ctypes.c_int64),
        ("start", ctypes.c_double),
        ("end", ctypes.c_double),
        ("pinned", ctypes.c_int64),
        ("ghost", ctypes.c_int64),
    )


_int64, _double, _int, _text = ctypes.c_int64, ctypes.c_double, ctypes.c_int, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "sim_register": ([], None),
    "sim_set_capacity": ([_int64], None),
    "sim_capacity": ([], _int64),
    "sim_set_others": ([_int64], None),
    "sim_others": ([], _int64),
    "sim_host_register": ([_int64, _int64], _int),
    "sim_host_unregister": ([_int64], _int),
    "sim_delay_copy": ([_int64, _double], None),
    "sim_refuse_allocation": ([_int64], None),
    "sim_refuse_pinning": ([_int64], None),
    "sim_clock": ([], _double),
    "sim_host_clock": ([], _double),
    "sim_advance_host": ([_double], None),
    "sim_reset_clock": ([], None),
    "sim_option_name": ([_int], _text),
    "sim_option_value": ([_int], _double),
    "sim_set_option": ([_text, _double], _int),
    "sim_counter_name": ([_int], _text),
    "sim_counters": ([ctypes.POINTER(_int64), _int], _int),
    "sim_engine_counters": ([ctypes.POINTER(_double)] * 4, None),
    "sim_trace": ([ctypes.POINTER(TraceRecord), _int64], _int64),
    "sim_copies": ([ctypes.POINTER(CopyRecord), _int64], _int64),
    "sim_clear_copies": ([], None),
    "sim_last_race": ([_text, _int64], _int64),
    "sim_clear_races": ([], None),
}

_library: ctypes.CDLL | None = None
_counter_names: tuple[str, ...] = ()
_option_names: tuple[str, ...] = ()


def open_library(path: Path) -> None:
    """Loads the library, which registers its kernels with torch, and registers the device's hooks."""
    global _library, _counter_names, _option_names
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    library = ctypes.CDLL(str(path))
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = result
    library.sim_register()
    _library = library
    _counter_names = _names("sim_counter_name")
    _option_names = _names("sim_option_name")


def library() -> ctypes.CDLL:
    """The loaded library. RuntimeError before ``open_library``."""
    if _library is None:
        raise RuntimeError("the simulated accelerator is not loaded")
    return _library


def _names(function: str) -> tuple[str, ...]:
    names: list[str] = []
    while (name := getattr(library(), function)(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def counters() -> dict[str, int]:
    """All integer counters by name."""
    values = (ctypes.c_int64 * len(_counter_names))()
    library().sim_counters(values, len(_counter_names))
    return dict(zip(_counter_names, values, strict=True))


def engine_counters() -> dict[str, float]:
    """FLOP of all kernels, and seconds for which each of the three engines was busy."""
    values = [ctypes.c_double() for _ in range(4)]
    library().sim_engine_counters(*(ctypes.byref(value) for value in values))
    return dict(zip(("flops", "busy_compute", "busy_h2d", "busy_d2h"), (value.value for value in values), strict=True))


def options() -> dict[str, float]:
    """Every option with its present value."""
    return {name: float(library().sim_option_value(index)) for index, name in enumerate(_option_names)}


def set_option(name: str, value: float) -> None:
    """KeyError, naming the options there are, for an unknown one."""
    if library().sim_set_option(name.encode(), float(value)) != 0:
        raise KeyError(f"unknown option {name!r}; there are {', '.join(_option_names)}")


def trace() -> list[TraceRecord]:
    room = counters()["trace"]
    records = (TraceRecord * room)()
    return list(records[: library().sim_trace(records, room)])


def copies() -> list[CopyRecord]:
    room = counters()["copies"]
    records = (CopyRecord * room)()
    return list(records[: library().sim_copies(records, room)])


def last_race() -> str:
    """The newest race's message, or the empty string."""
    room = 512
    message = ctypes.create_string_buffer(room)
    library().sim_last_race(message, room)
    return message.value.decode()
