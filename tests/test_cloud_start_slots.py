"""Whose turn it is: clones wait for each other, and what nobody waits for waits for all."""

import asyncio
import os
from collections.abc import Coroutine
from typing import Any

import pytest

from oscloudd.cloud import start_slots
from oscloudd.cloud.start_slots import CloneTurn, StartSlots

LIMIT_SECONDS = 90
TURNS = len(os.sched_getaffinity(0)) + 1


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, LIMIT_SECONDS))


async def take_all(slots: StartSlots) -> list[CloneTurn]:
    return [await slots.begin_clone() for _ in range(TURNS)]


async def is_waiting(task: "asyncio.Task[Any]") -> bool:
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return not task.done()


def test_a_clone_waits_for_another_to_greet_and_a_boot_does_not() -> None:
    async def scene() -> None:
        slots = StartSlots(1)
        turns = await take_all(slots)
        more = asyncio.create_task(slots.begin_clone())
        assert await is_waiting(more)
        async with slots:
            pass
        turns[0].release()
        turns[0].release()
        (await more).release()
        another = await slots.begin_clone()
        last = asyncio.create_task(slots.begin_clone())
        assert await is_waiting(last)  # a turn that is given back twice is one
        last.cancel()
        another.release()

    run(scene())


def test_a_clone_that_never_greets_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_slots, "_CLONE_SECONDS", 0.05)

    async def scene() -> None:
        slots = StartSlots(1)
        await take_all(slots)
        (await slots.begin_clone()).release()

    run(scene())


def test_one_that_is_cancelled_while_it_waits_is_waited_for_no_more() -> None:
    async def scene() -> None:
        slots = StartSlots(1)
        turns = await take_all(slots)
        waiting = asyncio.create_task(slots.begin_clone())
        assert await is_waiting(waiting)
        waiting.cancel()
        for turn in turns:
            turn.release()
        assert await slots.wait_idle(LIMIT_SECONDS)

    run(scene())


def test_a_gap_between_two_starts_is_no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_slots, "_CALM_SECONDS", 2.0)

    async def scene() -> None:
        slots = StartSlots(1)
        resting = asyncio.create_task(slots.wait_idle(LIMIT_SECONDS))
        for _ in range(5):
            with slots.without_turn():
                await asyncio.sleep(0.02)
            assert not resting.done()
            await asyncio.sleep(0.02)
        assert await resting

    run(scene())


def test_who_waits_for_rest_is_told_when_there_is_none() -> None:
    async def scene() -> None:
        slots = StartSlots(1)
        async with slots:
            assert not await slots.wait_idle(0.05)

    run(scene())
