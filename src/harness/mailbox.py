"""Commands to a run from any process that reaches its store: answers, guidance, an end. Plain data."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from harness.errors import CheckpointCorrupt
from harness.records import DecisionName


class Answer(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """An answer to a question, signed by whoever gives it.

    Attributes:
        by: who answers.
        text: the reason of a rejection, or the guidance.
        arguments: edited arguments, JSON text.
        mac: the signature; see ``harness.approval.Seal``.

    >>> Answer("q1", "reject", "ann", "").text
    ''
    """

    approval_id: str
    decision: DecisionName
    by: str
    mac: str
    text: str = ""
    arguments: str = ""


class Guidance(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Something to tell the agents before their next model call.

    Attributes:
        agent_id: whom; empty for every agent at work.

    >>> Guidance("Look at the log first.", "ann").agent_id
    ''
    """

    text: str
    by: str
    agent_id: str = ""


class Cancel(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """End the run for good.

    >>> Cancel("not needed", "ann").reason
    'not needed'
    """

    reason: str
    by: str


Command: TypeAlias = Answer | Guidance | Cancel


class Mail(msgspec.Struct, frozen=True):
    """A command in a run's mailbox.

    Attributes:
        id: names it; taken once, whatever happens.
        received_at: when the store got it, seconds since the epoch.

    >>> Mail("m1", 0.0, Cancel("not needed", "ann")).command.by
    'ann'
    """

    id: str
    received_at: float
    command: Command


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Command)


def encode_command(command: Command) -> bytes:
    """Write a command as JSON."""
    return _encoder.encode(command)


def decode_command(data: bytes, *, where: str) -> Command:
    """Read what ``encode_command`` wrote.

    Raises:
        CheckpointCorrupt: it is no command of this release.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise CheckpointCorrupt(f"{where} holds a command this release cannot read: {error}") from None
