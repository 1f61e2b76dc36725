"""What every test module shares: reproducible hypothesis runs, where hypothesis is there; a key and a Ctrl-C of their
own."""

import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest

with suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("rollout", deadline=None, derandomize=True, database=None, max_examples=40)
    settings.load_profile("rollout")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The key that seals caches is made for the tests, not in the state folder of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield
