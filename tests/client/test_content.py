"""What a job would run is hashed from its installed source, without running it."""

import hashlib
import importlib.util
import py_compile
import sys
import tomllib
import zipfile
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.content import OWN, PACKAGE, content_of, describe, package_hash, source_hash
from client.policy import Policy
from privacy.errors import JobError
from strategies.job import Job
from tests.strategies.jobs import make_job

ROOT = Path(__file__).parent.parent.parent
BOMB = "raise SystemExit('imported')\n"
FILES = {"__init__.py": BOMB, "tasks.py": BOMB + "class Net: ...\n", "deep/__init__.py": "", "deep/more.py": "x = 1\n"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that modules are found in."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(place: Path, files: dict[str, str], name: str = "bringsown") -> Path:
    for path, text in files.items():
        (place / name / path).parent.mkdir(parents=True, exist_ok=True)
        (place / name / path).write_text(text)
    importlib.invalidate_caches()
    return place / name


def job_with(task: str, strategy: str = "fedavg") -> Job:
    return make_job(task={"name": task}, strategy={"name": strategy})


def by_hand(files: dict[str, bytes]) -> str:
    """The hash, worked out from its definition alone."""
    stream = b"fedchorus content v1\0"
    for name in sorted(files):
        for part in (name.encode(), files[name]):
            stream += len(part).to_bytes(8, "little") + part
    return "sha256:" + hashlib.sha256(stream).hexdigest()


def test_a_package_is_hashed_as_defined_and_never_imported(place: Path) -> None:
    root = install(place, FILES)
    (root / "notes.txt").write_text("no source")
    before = set(sys.modules)
    expected = by_hand({f"bringsown/{name}": text.encode() for name, text in FILES.items()})
    names = ("bringsown.tasks:Net", "bringsown:Net", "bringsown.deep:Net", "bringsown.deep.more:Net")
    assert {source_hash(name, key="task.name") for name in names} == {expected}
    assert set(sys.modules) == before
    with pytest.raises(SystemExit, match="imported"):  # Importing it would have shown.
        importlib.import_module("bringsown.tasks")


def test_a_module_is_hashed_as_its_one_file(place: Path) -> None:
    (place / "lonely.py").write_text(BOMB)
    (place / "other.py").write_text("y = 2")
    importlib.invalidate_caches()
    assert source_hash("lonely:Net", key="task.name") == by_hand({"lonely.py": BOMB.encode()})


def test_what_ships_is_hashed_as_the_installed_fedchorus() -> None:
    files = {p.relative_to(ROOT).as_posix(): p.read_bytes() for name in OWN for p in (ROOT / name).rglob("*.py")}
    assert package_hash() == by_hand(files)
    code = content_of(make_job())
    assert code == dict.fromkeys((PACKAGE, "tabular-classification", "fedavg"), package_hash())


def test_a_job_is_hashed_under_the_names_that_it_uses(place: Path) -> None:
    install(place, FILES)
    (place / "lonely.py").write_text("")
    importlib.invalidate_caches()
    task, strategy = "bringsown.tasks:Net", "lonely:Mean"
    assert content_of(job_with(task, strategy)) == {
        PACKAGE: package_hash(),
        task: source_hash(task, key="task.name"),
        strategy: source_hash(strategy, key="strategy.name"),
    }


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_changed_byte_changes_the_hash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        path = install(place, FILES) / data.draw(st.sampled_from([name for name, text in FILES.items() if text]))
        before = source_hash("bringsown:Net", key="task.name")
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        assert source_hash("bringsown:Net", key="task.name") != before


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "added.py").write_text(""),
        lambda root: (root / "deep" / "more.py").rename(root / "deep" / "less.py"),
        lambda root: (root / "deep" / "more.py").rename(root / "more.py"),
        lambda root: (root / "deep" / "more.py").unlink(),
        lambda root: (root / ".hidden.py").write_text(""),
        lambda root: (root / "__pycache__").mkdir() or (root / "__pycache__" / "odd.py").write_text(""),
    ],
)
def test_a_file_that_comes_goes_or_moves_changes_the_hash(change: Callable[[Path], object], place: Path) -> None:
    root = install(place, FILES)
    before = source_hash("bringsown:Net", key="task.name")
    change(root)
    assert source_hash("bringsown:Net", key="task.name") != before


def test_text_cannot_move_between_a_files_name_and_its_content(place: Path) -> None:
    one, two = install(place, {"__init__.py": "", "a.py": "b"}, "one"), install(place, {"__init__.py": "b"}, "two")
    (one / "a.py").rename(one / "ab.py")
    (one / "ab.py").write_text("")
    hashes = {source_hash(f"{root.name}:X", key="task.name") for root in (one, two)}
    (one / "ab.py").rename(one / "a.py")
    (one / "a.py").write_text("b")
    assert len(hashes | {source_hash("one:X", key="task.name")}) == 3


def test_what_python_compiled_folders_and_links_within_the_package_are_no_matter(place: Path) -> None:
    root = install(place, FILES)
    before = source_hash("bringsown:Net", key="task.name")
    py_compile.compile(str(root / "deep" / "more.py"))
    assert list(root.glob("deep/__pycache__/*.pyc"))
    (root / "folder.py").mkdir()
    assert source_hash("bringsown:Net", key="task.name") == before
    (root / "deep" / "same.py").symlink_to(root / "deep" / "more.py")
    assert source_hash("bringsown:Net", key="task.name") != before


def test_a_package_that_is_reached_by_a_link_is_hashed_where_it_lies(place: Path) -> None:
    root = install(place, FILES, "elsewhere/bringsown")
    (place / "bringsown").symlink_to(root)
    importlib.invalidate_caches()
    assert source_hash("bringsown:Net", key="task.name") == by_hand(
        {f"bringsown/{name}": text.encode() for name, text in FILES.items()}
    )


def test_a_description_is_what_a_policy_has_to_say(place: Path) -> None:
    install(place, FILES)
    for job in (make_job(), job_with("bringsown.tasks:Net"), job_with("bringsown.tasks:Net", "bringsown:Mean")):
        own = Policy.model_validate({"version": 1, **tomllib.loads(describe(job))})
        code = content_of(job)
        assert own.package == code[PACKAGE]
        for table, name in ((own.tasks, job.task.name), (own.strategies, job.strategy.name)):
            assert table.code == ({name: code[name]} if ":" in name else {})
            assert table.allow == ([] if ":" in name else [name])


def linked_folder(root: Path) -> None:
    (root.parent / "outside").mkdir()
    (root / "inner").symlink_to(root.parent / "outside")


def linked_file(root: Path) -> None:
    (root.parent / "outside.py").write_text("")
    (root / "inner.py").symlink_to(root.parent / "outside.py")


def into_an_archive(root: Path) -> None:
    with zipfile.ZipFile(root.parent / "archive.zip", "w") as archive:
        archive.writestr("bringsown/__init__.py", "")
    (root / "__init__.py").unlink()
    root.rename(root.parent / "gone")
    sys.path.insert(0, str(root.parent / "archive.zip"))


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("absent_module:Net", lambda root: None, "no module 'absent_module' is installed in this environment"),
    ("bringsown.absent:Net", lambda root: None, "the installed 'bringsown' has no source file for the module"),
    ("bringsown.deep.more.x:Net", lambda root: None, "has no source file"),
    ("bringsown.empty:Net", lambda root: (root / "empty").mkdir(), "has no source file"),
    ("bringsown:Net", lambda root: (root / "__init__.py").unlink(), "'bringsown' is a namespace package"),
    ("bringsown:Net", linked_folder, "'bringsown/inner' is a link to a folder or out of the package"),
    (
        "bringsown:Net",
        lambda root: (root / "inner").symlink_to(root / "deep"),
        "'bringsown/inner' is a link to a folder",
    ),
    ("bringsown:Net", linked_file, "'bringsown/inner.py' is a link to a folder or out of the package"),
    ("bringsown:Net", lambda root: (root / "x.py").symlink_to(root / "absent.py"), "cannot be read (No such file"),
    ("bringsown:Net", lambda root: (root / f"fast{EXTENSION_SUFFIXES[0]}").touch(), "is compiled; only plain source"),
    ("bringsown:Net", lambda root: (root / "deep" / "fast.so").touch(), "'bringsown/deep/fast.so' is compiled"),
    ("bringsown:Net", lambda root: (root / "old.pyc").touch(), "'bringsown/old.pyc' is compiled"),
    ("bringsown:Net", into_an_archive, "'bringsown' is compiled, built in or in an archive"),
    ("sys:Net", lambda root: None, "'sys' is compiled, built in"),
    ("_ssl:Net", lambda root: None, "'_ssl' is compiled, built in"),
    ("__main__:Net", lambda root: None, "no module '__main__' is installed"),
    (":Net", lambda root: None, "':Net' is not package.module:Name"),
    ("bringsown:", lambda root: None, "'bringsown:' is not package.module:Name"),
    (".bringsown:Net", lambda root: None, "is not package.module:Name"),
    ("bringsown..tasks:Net", lambda root: None, "is not package.module:Name"),
    ("../bringsown:Net", lambda root: None, "is not package.module:Name"),
    ("bringsown/tasks:Net", lambda root: None, "is not package.module:Name"),
    ("bringsown:Net:More", lambda root: None, "is not package.module:Name"),
    ("bringsown\n:Net", lambda root: None, "is not package.module:Name"),
    (f"{'a' * 9999}.b c:Net", lambda root: None, "is not package.module:Name"),
]


@pytest.mark.parametrize(("name", "spoil", "said"), BAD, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_what_cannot_be_hashed_is_refused_in_one_short_line(
    name: str, spoil: Callable[[Path], object], said: str, place: Path
) -> None:
    spoil(install(place, FILES))
    importlib.invalidate_caches()
    with pytest.raises(JobError) as caught:
        content_of(job_with(name))
    assert str(caught.value).startswith("task.name: ")
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 250


def test_a_module_that_is_loaded_under_anothers_name_is_not_taken_for_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(place, FILES)
    monkeypatch.setitem(sys.modules, "bringsown", hashlib)
    with pytest.raises(JobError, match="no module 'bringsown' is installed"):
        source_hash("bringsown:Net", key="task.name")


def test_a_package_that_was_given_a_second_folder_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(place, FILES)
    spec = importlib.util.find_spec("bringsown")
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loaded.__path__.append(str(place))  # As pkgutil.extend_path does.
    monkeypatch.setitem(sys.modules, "bringsown", loaded)
    with pytest.raises(JobError, match="'bringsown' is spread over several folders"):
        source_hash("bringsown:Net", key="task.name")


def test_an_error_names_the_strategy_where_it_is_the_strategys() -> None:
    with pytest.raises(JobError, match=r"^strategy\.name: no module"):
        content_of(job_with("tabular-classification", "absent_module:Mean"))
