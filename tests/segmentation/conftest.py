import shutil
import sys

import pytest


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory):
    from tests.segmentation.runs import make_scenes

    return make_scenes(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def datasets(scenes_root, monkeypatch):
    """A folder of data sets with a few scenes, where Detectron2 looks for it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(scenes_root))
    forget_scenes()  # of a test that had others of the same names
    yield scenes_root
    forget_scenes()


def forget_scenes():
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name in [name for name in DatasetCatalog.list() if name.startswith("scenes_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(autouse=True)
def loggers():
    """Detectron2 logs to the output of the first test for ever; each test gets its own."""
    yield
    if "segmentation.cli" in sys.modules:
        sys.modules["segmentation.cli"].end_logging()


@pytest.fixture
def own_datasets(tmp_path, datasets, monkeypatch):
    """A copy that a test may break."""
    shutil.copytree(datasets / "scenes", tmp_path / "data" / "scenes")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    return tmp_path / "data" / "scenes"
