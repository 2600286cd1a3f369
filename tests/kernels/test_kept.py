import gc

import torch

from kvstore_kernels.cuda.kept import kept

CPU, META = torch.device("cpu"), torch.device("meta")


class Thing:
    pass


def test_each_object_is_prepared_once_a_device() -> None:
    prepared: list[tuple[int, torch.device]] = []

    @kept
    def prepare(of: Thing, device: torch.device) -> list[int]:
        prepared.append((id(of), device))
        return [len(prepared)]

    one, two = Thing(), Thing()
    assert prepare(one, CPU) is prepare(one, CPU)
    assert prepare(one, META) is not prepare(one, CPU)
    assert prepare(two, CPU) is not prepare(one, CPU)
    assert prepared == [(id(one), CPU), (id(one), META), (id(two), CPU)]


def test_what_was_prepared_goes_with_its_object() -> None:
    made: list[int] = []

    @kept
    def prepare(of: Thing, device: torch.device) -> int:
        made.append(1)
        return len(made)

    for expected in range(1, 6):  # an address may come again; what was kept of it must not
        thing = Thing()
        assert prepare(thing, CPU) == expected
        del thing
        gc.collect()
