from __future__ import annotations

import itertools
import json
import random
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dedup.cli import capacity
from dedup.estimate import curve, store
from dedup.estimate.fingerprints import Contents, Instance
from tests.estimate.build import instance
from tests.estimate.test_instances import two_peaks

from .conftest import EQUAL_PAGES, Dedup, Start, on_terminal

SHARED, OWN = 20_000, 1000
PAGE = 4096
RAM = 4 << 30


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three instances with 20,000 contents in common and 1,000 of their own."""
    paths = [tmp_path / f"web-{i}.dedup" for i in range(3)]
    for path, one in zip(paths, two_peaks(3, SHARED, OWN), strict=True):
        store.save(one, path)
    return [*map(str, paths)]


def test_help_begins_with_an_example(dedup: Dedup) -> None:
    result = dedup("capacity", "--help")
    assert result.status == 0
    assert result.out.startswith("Examples:\n  sudo dedup scan --pid 101 --save web-1.dedup")


def test_how_many_fit(dedup: Dedup, files: list[str]) -> None:
    found = dedup("capacity", *files, "--ram", "4G", "--headroom", "0", "--json").json
    assert found["kind"] == "capacity"
    assert found["label"] == "web"
    fits, curve = found["fits"], found["curve"]
    assert fits["without_ksm"] == RAM // ((SHARED + OWN) * PAGE)
    assert [p["instances"] for p in curve] == [*range(1, len(curve) + 1)]
    assert len(curve) == max(16, fits["with_ksm"])
    for p in curve:
        n = p["instances"]
        assert p["without_ksm_frames"] == n * (SHARED + OWN)
        # The 256 mappings of a node are reached at 257 instances.
        assert p["frames"] == -(-n // 256) * SHARED + n * OWN
        assert p["low_bytes"] <= p["bytes"] <= p["high_bytes"]
        # An rmap_item a page, a stable node for each content that several have.
        own = p["bytes"] - p["frames"] * PAGE - n * (SHARED + OWN) * 64
        assert own == 0 if n == 1 else 0 < own <= -(-n // 256) * SHARED * 64
    assert curve[-1]["bytes"] <= RAM
    assert fits["without_ksm"] <= fits["safe"] <= fits["low"] <= fits["with_ksm"] <= fits["high"]
    assert found["classes_suspected"] is False
    assert found["warnings"] == []
    # Should the ones not seen share with nobody, the three seen still do.
    assert curve[11]["worst_frames"] == SHARED + 3 * OWN + 9 * (SHARED + OWN)
    assert fits["without_ksm"] < fits["worst"] <= fits["low"]
    assert {d["name"] for d in found["stress"]["days"]} == {"measured", "tenth", "all"}
    every = found["stress"]["days"][-1]
    assert every["frames"] == curve[-1]["without_ksm_frames"]
    assert every["fits"] is False


def test_the_curve_goes_as_far_as_asked(dedup: Dedup, files: list[str]) -> None:
    args = ["capacity", *files, "--ram", "100M"]
    assert len(dedup(*args, "--json").json["curve"]) == 16
    found = dedup(*args, "-n", "40", "--json").json
    assert len(found["curve"]) == 40
    assert found["fits"]["with_ksm"] < 16
    assert " 40 " in dedup(*args, "-n", "40").out


def test_memory_that_others_need(dedup: Dedup, files: list[str]) -> None:
    def budget(*args: str) -> int:
        memory = dedup("capacity", *files, "--ram", "4G", *args, "--json").json["memory"]
        return int(memory["budget_bytes"])

    assert budget("--headroom", "0") == RAM
    assert budget("--headroom", "25%") == RAM * 3 // 4
    assert budget("--reserve", "1GiB", "--headroom", "0") == RAM - (1 << 30)


def test_for_people(dedup: Dedup, files: list[str]) -> None:
    result = dedup("capacity", *files, "--ram", "4G")
    assert result.status == 0
    first, second = result.out.splitlines()[:2]
    assert first.startswith("web: ")
    assert "without" in first
    assert "3 instances seen" in result.out
    fits = dedup("capacity", *files, "--ram", "4G", "--json").json["fits"]
    words = " ".join(result.out.split())
    assert "Up to 63 % of all may be of a kind not seen" in words
    assert f"share with nobody, {fits['worst']:,} fit." in words
    assert "█" in result.out
    assert second
    assert result.err == ""
    plain = dedup("capacity", *files, "--ram", "4G", "--ascii").out
    assert plain.isascii()
    assert "#" in plain
    narrow = dedup("capacity", *files, "--ram", "4G", COLUMNS="40").out
    assert max(map(len, narrow.splitlines())) <= 40


def test_tunables_other_than_those_of_the_scans(dedup: Dedup, files: list[str]) -> None:
    found = dedup("capacity", *files, "--tunable", "max_page_sharing=2", "--json").json
    assert found["tunables"]["max_page_sharing"] == 2
    assert found["curve"][3]["frames"] == 2 * SHARED + 4 * OWN


@pytest.mark.parametrize("given", [1, 2])
def test_too_few_instances(dedup: Dedup, files: list[str], given: int) -> None:
    result = dedup("capacity", *files[:given], "--json")
    assert result.status == 0
    (warning,) = result.json["warnings"]
    assert warning["code"] == ["one-instance", "two-instances"][given - 1]
    point = result.json["curve"][7]
    # Nothing rules out that the next ones share nothing.
    assert point["high_frames"] >= 7 * (SHARED + OWN)
    assert "Warning" in dedup("capacity", *files[:given]).err


def test_classes_are_told(dedup: Dedup, files: list[str], tmp_path: Path) -> None:
    store.save(instance(9, {1 << 40 | c: (1, 1) for c in range(SHARED)}), tmp_path / "odd.dedup")
    found = dedup("capacity", *files[:2], str(tmp_path / "odd.dedup"), "--json").json
    assert found["classes_suspected"] is True
    (warning,) = found["warnings"]
    assert warning["code"] == "classes"
    assert "(2 + 1)" in warning["message"]
    assert f"0 to {SHARED:,} contents in common" in warning["message"]
    worst = found["fits"]["worst"]
    assert f"the upper bound is the worst case: {worst:,} fit should" in warning["message"]
    assert all(p["worst_bytes"] == p["high_bytes"] for p in found["curve"][3:])


@pytest.mark.parametrize(
    ("change", "code"),
    [({"drifting": True}, "drifting"), ({"looks": 1}, "one-look"), ({"complete": False}, "partial"),
     ({"frames_known": False}, "frames-hidden"), ({"swap_bytes": 4096}, "swap"),
     ({"extrapolated": True}, "extrapolated"), ({"randomized": "none"}, "randomized"),
     ({"tunables": {"use_zero_pages": 1}}, "tunables")],
)  # fmt: skip
def test_warnings(
    dedup: Dedup, files: list[str], tmp_path: Path, change: dict[str, Any], code: str
) -> None:
    one = store.load(Path(files[2]))
    path = tmp_path / "other.dedup"
    store.save(replace(one, facts=replace(one.facts, **change)), path)
    found = dedup("capacity", *files[:2], str(path), "--json").json
    assert [w["code"] for w in found["warnings"]] == [code]


def test_fixed_addresses_may_hide_layouts(dedup: Dedup, files: list[str]) -> None:
    for path in map(Path, files):
        one = store.load(path)
        store.save(replace(one, facts=replace(one.facts, randomized="none")), path)
    found = dedup("capacity", *files, "--json").json
    assert [w["code"] for w in found["warnings"]] == ["fixed-addresses"]
    # Three of one kind are seen by chance in one study of 20 where 63 % are of others.
    assert found["unseen_class_share"] == pytest.approx(1 - 0.05 ** (1 / 3))
    message = found["warnings"][0]["message"]
    assert "63 %" in message
    assert f"in the worst case {found['fits']['worst']:,} fit should" in message


def test_a_pilot_is_proposed_for_what_these_can_not_tell(files: list[str]) -> None:
    screen = " ".join(on_terminal(["capacity", *files]).screen.split())
    assert "dedup capacity --pilot 'COMMAND' --settings" in screen
    for path in map(Path, files):
        one = store.load(path)
        store.save(replace(one, facts=replace(one.facts, randomized="none")), path)
    assert "--pilot" not in on_terminal(["capacity", *files]).screen


def test_several_services(dedup: Dedup, files: list[str], tmp_path: Path) -> None:
    one = store.load(Path(files[2]))
    path = tmp_path / "db.dedup"
    store.save(replace(one, facts=replace(one.facts, label="db", instance="8")), path)
    result = dedup("capacity", *files, str(path))
    assert result.status == 2
    assert "db, web" in result.err
    assert (
        len(dedup("capacity", *files, str(path), "--label", "web", "--json").json["instances"]) == 3
    )
    assert dedup("capacity", *files, "--label", "none").status == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [(["--ram", "lots"], "no size"), (["--ram", "-1"], "no size"), (["--headroom", "100"], "below"),
     (["--headroom", "nan"], "per cent"), (["-n", "0"], "range"),
     (["--ram", "1G", "--reserve", "1G"], "takes all"), (["--ram", "0"], "above 0"),
     (["--tunable", "run=1"], "none of")],
)  # fmt: skip
def test_words_that_do_not_fit(dedup: Dedup, files: list[str], args: list[str], words: str) -> None:
    result = dedup("capacity", *files, *args)
    assert result.status == 2
    assert words in " ".join(result.err.split())


def test_the_longest_curve(dedup: Dedup, files: list[str]) -> None:
    assert capacity.INSTANCES_MOST == curve.MOST
    assert dedup("capacity", *files, "-n", str(curve.MOST + 1)).status == 2


def test_without_files(dedup: Dedup) -> None:
    result = dedup("capacity")
    assert result.status == 2
    assert "--save" in result.err


def test_bad_files(dedup: Dedup, files: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad\033[31m.dedup"
    for data in (b"", Path(files[0]).read_bytes()[:-50]):
        bad.write_bytes(data)
        result = dedup("capacity", files[0], str(bad))
        assert result.status == 7
        assert "bad" in result.err
        assert "\033[31m." not in result.err
    assert dedup("capacity", files[0], files[0], "--json").json["error"]["code"] == "bad-input"
    assert dedup("capacity", str(tmp_path / "none.dedup")).status == 7


def test_from_processes_to_a_plan(dedup: Dedup, start: Start, tmp_path: Path) -> None:
    paths = []
    for i, process in enumerate(start() for _ in range(3)):
        paths.append(str(tmp_path / f"py-{i}.dedup"))
        result = dedup("scan", "--pid", str(process.pid), "--passes", "1", "--save", paths[-1],
                       "--label", "py", "--json")  # fmt: skip
        assert result.status == 0
        assert result.json["kind"] == "scan"
    key = tmp_path / ".dedup-key"
    assert key.stat().st_mode & 0o777 == 0o600
    found = dedup("capacity", *paths, "--json").json
    assert found["label"] == "py"
    assert [w["code"] for w in found["warnings"]] == ["one-look"]
    # The pages that are equal in all and within each count twice in three instances.
    p = found["curve"][2]
    assert p["without_ksm_frames"] - p["frames"] >= 3 * EQUAL_PAGES - 4
    for a, b in itertools.pairwise(found["curve"]):
        assert b["frames"] > a["frames"]


def test_another_key(dedup: Dedup, start: Start, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.dedup") for i in range(2)]
    for i, path in enumerate(paths):
        dedup("scan", "--pid", str(start().pid), "--passes", "1", "--save", path, "--key-file",
              str(tmp_path / f"key-{i}"))  # fmt: skip
    result = dedup("capacity", *paths)
    assert result.status == 7
    assert "another key" in result.err


def test_saving_words_that_do_not_fit(dedup: Dedup, start: Start, tmp_path: Path) -> None:
    pid = str(start().pid)
    for args, words in (
        (["--label", "x"], "need --save"),
        (["--save", str(tmp_path / "a"), "--seed", "1"], "--seed"),
        (["--save", str(tmp_path / "a"), "--label", ""], "1 to 64"),
        (["--save", ""], "needs the name of a file"),
        (["--save", "/proc/self/exe"], "would be replaced"),
        (["--save", str(tmp_path / "no" / "a")], "there is no folder"),
        (["--save", str(tmp_path / ".dedup-key")], "the file of the key"),
        (["--save", str(tmp_path / "a"), "--key-file", str(tmp_path / "a")], "the file of the key"),
    ):
        result = dedup("scan", "--pid", pid, *args)
        assert result.status == 2
        assert words in " ".join(result.err.split())
    key = tmp_path / "key"
    key.write_text("a" * 64)
    key.chmod(0o644)
    result = dedup("scan", "--pid", pid, "--save", str(tmp_path / "a"), "--key-file", str(key))
    assert result.status == 8
    assert not (tmp_path / "a").exists()
    key.chmod(0o600)
    assert json.loads(
        dedup("scan", "--pid", pid, "--save", "/proc/a", "--key-file", str(key), "--json").out
    )["error"]["code"] == "io"  # fmt: skip


def image(path: Path, number: int, shared: int = 40, own: int = 10) -> Path:
    """Memory whose pages the next number shares but for its own."""
    draw = [random.Random(99), random.Random(number)]
    path.write_bytes(b"".join(d.randbytes(PAGE) for d, n in zip(draw, (shared, own), strict=True)
                              for _ in range(n)) + bytes(5 * PAGE))  # fmt: skip
    return path


def test_from_files_to_a_plan(dedup: Dedup, tmp_path: Path) -> None:
    paths = [tmp_path / f"vm-{i}.dedup" for i in range(3)]
    for i, path in enumerate(paths):
        ram = image(tmp_path / f"ram-{i}", i)
        result = dedup("scan", "--image", str(ram), "--save", str(path), "--label", "vm", "--json")
        assert result.status == 0
    result = dedup("capacity", *map(str, paths), "--ram", "16M", "--json")
    found = result.json
    assert found["curve"][9]["frames"] == 1 + 40 + 10 * 10
    one = found["instances"][0]
    assert (one["source"], one["guest_bytes"], one["page_table_bytes"]) == (
        "image",
        55 * PAGE,
        None,
    )
    (warning,) = found["warnings"]
    assert warning["code"] == "from-files"
    assert "3 of 3 instances" in warning["message"]
    assert "what fork shares" in warning["message"]
    # The same memory again is no further instance.
    dedup("scan", "--image", str(image(tmp_path / "again", 2)), "--save", str(tmp_path / "4.dedup"),
          "--label", "vm")  # fmt: skip
    result = dedup("capacity", *map(str, paths), str(tmp_path / "4.dedup"))
    assert result.status == 7
    assert "4.dedup" in result.err
    assert "same instance" in result.err


def test_a_core_that_lies_is_not_saved(dedup: Dedup, tmp_path: Path) -> None:
    for data in (b"\x7fELF" + bytes(60), b"\x7fELF\2\1\1" + b"\xff" * 4000):
        (tmp_path / "core").write_bytes(data)
        result = dedup(
            "scan", "--core", str(tmp_path / "core"), "--save", str(tmp_path / "x.dedup")
        )
        assert result.status == 7
        assert "core" in result.err
        assert not (tmp_path / "x.dedup").exists()


@pytest.mark.parametrize(
    ("change", "codes"),
    [({"kernel": "5.15"}, {"kernels"}), ({"source": "core"}, {"sources", "from-files"})],
)
def test_instances_that_differ(
    dedup: Dedup, files: list[str], tmp_path: Path, change: dict[str, Any], codes: set[str]
) -> None:
    one = store.load(Path(files[2]))
    path = tmp_path / "other.dedup"
    store.save(replace(one, facts=replace(one.facts, **change)), path)
    found = dedup("capacity", *files[:2], str(path), "--json").json
    assert {w["code"] for w in found["warnings"]} == codes


@pytest.fixture
def services(files: list[str], tmp_path: Path) -> list[str]:
    """Those of web, and three workers with half of web's contents."""
    paths = [tmp_path / f"worker-{i}.dedup" for i in range(3)]
    for i, path in enumerate(paths):
        layout = {**dict.fromkeys(range(SHARED // 2), (1, 1)),
                  **{(i + 1 << 30) + c: (1, 1) for c in range(OWN)}}  # fmt: skip
        one = instance(i, layout)
        store.save(replace(one, facts=replace(one.facts, label="worker", instance=f"w{i}")), path)
    return [*files, *map(str, paths)]


def test_a_mix(dedup: Dedup, services: list[str]) -> None:
    args = ["capacity", *services, "--mix", "web=5,worker=7", "--headroom", "0"]
    data = dedup(*args, "--ram", "192M", "--json").json
    mix = data["mix"]
    assert data["label"] == "web=5,worker=7"
    assert mix["frames"] == SHARED + 12 * OWN
    assert mix["frames"] == data["curve"][0]["frames"]
    assert mix["bytes"] == data["curve"][0]["bytes"]
    assert mix["without_ksm_frames"] == 5 * (SHARED + OWN) + 7 * (SHARED // 2 + OWN)
    assert mix["shared_frames"] == SHARED // 2
    assert [s["label"] for s in mix["services"]] == ["web", "worker"]
    assert [s["frames_alone"] for s in mix["services"]] == [SHARED + 5 * OWN,
                                                             SHARED // 2 + 7 * OWN]  # fmt: skip
    assert (mix["fits"], mix["fits_without_ksm"], mix["safe"]) == (True, False, False)
    # Twice the mix: twice as many of each.
    assert data["curve"][1]["frames"] == SHARED + 24 * OWN
    assert data["warnings"] == []
    text = dedup(*args, "--ram", "192M").out
    assert text.startswith("web=5,worker=7: ")
    assert "it fits in 192.0 MiB; a bad day does not. 1 mix fit" in " ".join(text.split())
    assert "within a service" in text
    small = dedup(*args, "--ram", "64M", "--json").json
    assert (small["mix"]["fits"], small["fits"]["with_ksm"]) == (False, 0)
    assert "does not fit" in dedup(*args, "--ram", "64M").out
    # Files of services that are not in the mix are left out.
    one = dedup("capacity", *services, "--mix", "worker=7", "--json").json
    assert one["mix"]["frames"] == SHARED // 2 + 7 * OWN
    assert one["mix"]["shared_frames"] == 0


def test_a_mix_of_labels_with_commas(dedup: Dedup, services: list[str]) -> None:
    """A comma ends a part only behind its number; each part may have an option of its own."""
    for path in services:
        one = store.load(Path(path))
        if one.facts.label == "worker":
            store.save(replace(one, facts=replace(one.facts, label="a,b c")), Path(path))
    mixed = [
        dedup("capacity", *services, *words, "--json").json["mix"]
        for words in (
            ("--mix", "web=5,a,b c=7"),
            ("--mix", "a,b c=7,web=5"),
            ("--mix", "web=5", "--mix", "a,b c=7"),
        )
    ]
    labels = [{s["label"]: s["instances"] for s in mix["services"]} for mix in mixed]
    assert labels == [{"web": 5, "a,b c": 7}] * 3
    assert {mix["frames"] for mix in mixed} == {SHARED + 12 * OWN}
    # What is proposed can be typed.
    hint = dedup("capacity", *services, "--json").json["error"]["hint"]
    words = next(part for part in hint.split("`") if part.startswith("--mix"))
    assert dedup("capacity", *services, *shlex.split(words)).status == 0
    unknown = dedup("capacity", *services, "--mix", "a=1,b c=1", "--json")
    assert (unknown.status, unknown.json["error"]["code"]) == (2, "usage")
    assert "they have 'a,b c', web" in unknown.json["error"]["hint"]
    twice = dedup("capacity", *services, "--mix", "web=1", "--mix", "web=2")
    assert twice.status == 2
    assert "names web twice" in " ".join(twice.err.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [("web", "type `--mix web=12`, or of several"), ("web=1,", "no service and number"),
     ("web", "no service and number"), ("web=0", "1 to"), ("web=1,web=2", "twice"),
     ("=3", "no service and number"), ("web=x", "no service and number"),
     ("web=99999", "1 to"), ("none=1", "no file is of the service none"), ("", "no service")],
)  # fmt: skip
def test_mixes_that_are_none(dedup: Dedup, services: list[str], words: str, said: str) -> None:
    result = dedup("capacity", *services, "--mix", words)
    assert result.status == 2
    assert said in " ".join(result.err.split())


def test_swap_takes_a_bad_day(dedup: Dedup, files: list[str]) -> None:
    def day(*args: str) -> dict[str, Any]:
        found = dedup("capacity", *files, "--ram", "4G", "--headroom", "0", *args, "--json").json
        assert found["stress"]["restart_seconds"] == pytest.approx(
            2 * found["cost"]["full_scan_seconds"]
        )
        days: dict[str, Any] = found["stress"]["days"][1]
        return days

    without = day()
    assert not without["fits"]
    assert not without["fits_in_swap"]
    assert without["swap_bytes"] == without["bytes"] - RAM
    assert without["merged_again_seconds"] > 0
    assert day("--swap", str(without["swap_bytes"]))["fits_in_swap"]
    assert not day("--swap", str(without["swap_bytes"] - 1))["fits_in_swap"]
    text = dedup("capacity", *files, "--ram", "4G", "--headroom", "0", "--swap", "16G").out
    assert "in swap" in " ".join(text.split())


def test_zero_pages_alone(dedup: Dedup, tmp_path: Path) -> None:
    paths = [tmp_path / f"z-{i}.dedup" for i in range(3)]
    for i, path in enumerate(paths):
        store.save(instance(i, {0: (100, 100), 1: (50, 50), 9 + i: (1, 1)}, zero=0), path)
    found = dedup("capacity", *map(str, paths), "--ram", "4M", "--json").json
    n = found["stress"]["instances"]
    frames = {d["name"]: d["frames"] for d in found["domains"]}
    assert frames["zero_pages"] == 51 * n
    assert frames["instance"] == 3 * n
    assert frames["label"] == found["curve"][n - 1]["frames"]
    assert frames["user"] is None


def test_a_warning_names_the_files(dedup: Dedup, files: list[str]) -> None:
    for path in map(Path, files[1:]):
        one = store.load(path)
        store.save(replace(one, facts=replace(one.facts, looks=1)), path)
    (warning,) = dedup("capacity", *files, "--json").json["warnings"]
    assert f"2 of 3 instances ({files[1]}, {files[2]}) " in warning["message"]


def test_hostile_facts_are_made_safe(dedup: Dedup, files: list[str]) -> None:
    for n, path in enumerate(map(Path, files)):
        one = store.load(path)
        facts = replace(one.facts, label="a\033[31mb", kernel=f"\033]0;{n}\a")
        store.save(replace(one, facts=facts), path)
    result = dedup("capacity", *files)
    assert result.status == 0
    assert "several kernels" in result.err
    for text in (result.out, result.err, dedup("capacity", *files, "--json").out):
        assert "\033" not in text
        assert "\a" not in text


def test_page_sizes_that_differ(dedup: Dedup, files: list[str]) -> None:
    one = store.load(Path(files[1]))
    store.save(replace(one, facts=replace(one.facts, page_size=65536)), Path(files[1]))
    result = dedup("capacity", *files)
    assert result.status == 7
    assert Path(files[1]).name in result.err.replace("\n  ", "")


def test_hostile_counts_take_no_more_than_the_files(dedup: Dedup, tmp_path: Path) -> None:
    """Each content with its own number of mappings, frames and huge pages, as many as can be."""
    draw = np.random.default_rng(5)
    rows = 200_000
    names = np.unique(draw.integers(0, 1 << 64, rows, np.uint64))
    paths = [tmp_path / f"x-{i}.dedup" for i in range(3)]
    for i, path in enumerate(paths):
        mappings, frames, outside = draw.integers(1, 1 << 32, (3, len(names))).astype(np.uint32)
        frames = np.minimum(mappings, frames)
        outside = np.minimum(frames, outside)
        zero = np.zeros(len(names), np.uint8)
        one = instance(i, {})
        facts = replace(one.facts, scanned_pages=int(mappings.sum(dtype=np.int64)))
        contents = Contents(names, mappings, frames, outside, mappings, zero)
        store.save(Instance(facts, contents), path)
    # Address space, with all that Python and its libraries map.
    limit = ("prlimit", "--as=4000000000", "--cpu=30")
    result = dedup("capacity", *map(str, paths), "-n", "10000", "--json", prefix=limit)
    assert result.status == 0, result.err
    assert len(result.json["curve"]) == 10_000
