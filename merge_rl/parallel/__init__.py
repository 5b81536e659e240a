"""Rank, world size, and the few exchanges between ranks: one process, or many by torchrun.

Rank 0 leads: it asks, the others answer, and what they answer comes in rank order. Messages are
plain JSON and tensors of features, never pickles, and go through host memory (gloo) on every kind
of device: features are needed there, and a round's fit into a few MB.

Nothing here can hang. Every wait looks for the failures of others, can be interrupted, and ends
after `timeout` seconds with the ranks that were waited for and what each was doing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from merge_rl.errors import MergeRLError, ParallelError, StoppedError
from merge_rl.parallel.group import Group as Group
from merge_rl.parallel.rendezvous import Place as Place
from merge_rl.parallel.rendezvous import open_store as open_store
from merge_rl.parallel.rendezvous import seconds_to_wait as seconds_to_wait


@contextmanager
def joined() -> Iterator[Group]:
    """The group of all processes of this launch; of one where there is no launcher.

    An error that leaves the block is told to the other ranks, so that none waits for this one.
    """
    place = Place.here()
    if place.size == 1:
        yield Group(place)
        return
    timeout = seconds_to_wait()
    group = Group(place, open_store(place, timeout), timeout)
    try:
        group.connect()
        yield group
    except StoppedError:  # another rank has said why
        group.abandon()
        raise
    except MergeRLError as error:
        sentence = None if group.leads else group.failure()
        if sentence is not None:  # the same, or what follows from it
            group.abandon()
            raise StoppedError(sentence) from None
        group.fail(str(error))
        raise
    except KeyboardInterrupt:
        group.abandon()
        # A launcher stops all when one has failed: what that one said is the reason.
        sentence = group.failure() if group.leads else None
        if sentence is not None:
            raise ParallelError(sentence) from None
        if group.leads:
            group.fail("stopped")
        raise
    except BaseException as error:
        group.fail(f"unexpected {type(error).__name__}: {error}")
        raise
