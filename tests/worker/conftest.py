"""One pool of four worker processes and the tiny models, for all worker tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.worker.family_table import FamilyTable
from tests.worker.tiny_cogvideox import cogvideox_reference
from tests.worker.tiny_hunyuan import hunyuan_reference
from tests.worker.tiny_ltx import ltx_reference
from tests.worker.tiny_models import Reference, flux_reference, wan_reference
from tests.worker.tiny_qwen import qwen_reference
from tests.worker.worker_pool import Pool


def pytest_configure(config: pytest.Config) -> None:
    """The table of families stands under every run that tests them."""
    config.pluginmanager.register(FamilyTable())


@pytest.fixture(scope="session")
def pool_of_session() -> Iterator[Pool]:
    """The processes."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
        pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def pool(pool_of_session: Pool) -> Pool:
    """The pool, with four living workers."""
    pool_of_session.heal()
    return pool_of_session


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A tiny Flux and its stock answer."""
    return flux_reference(tmp_path_factory.mktemp("models") / "tiny-flux")


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A tiny Wan and its stock answer."""
    return wan_reference(tmp_path_factory.mktemp("models") / "tiny-wan")


@pytest.fixture(scope="session")
def ltx(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A tiny LTX-Video and its stock answer."""
    return ltx_reference(tmp_path_factory.mktemp("models") / "tiny-ltx")


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A tiny Qwen-Image and its stock answer."""
    return qwen_reference(tmp_path_factory.mktemp("models") / "tiny-qwen")


@pytest.fixture(scope="session")
def cogvideox(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A tiny CogVideoX and its stock answer."""
    return cogvideox_reference(tmp_path_factory.mktemp("models") / "tiny-cogvideox")


@pytest.fixture(scope="session")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A tiny HunyuanVideo and its stock answer."""
    return hunyuan_reference(tmp_path_factory.mktemp("models") / "tiny-hunyuan")
