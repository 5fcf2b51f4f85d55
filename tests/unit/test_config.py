"""Configuration files: what they mean together, and what is said of a wrong one."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from lab.program import run_program
from mcrelay import config, config_files
from mcrelay.cli_run import make_options
from mcrelay.config import PROBLEMS_MAX, ConfigError, Configuration, read, rule_tables
from mcrelay.config_files import FileError
from mcrelay.declared import difference
from mcrelay.errors import Error
from mcrelay.messages import Levels, LogSettings
from mcrelay.ruletext import parse_rule
from mcrelay.settings import Settings, schema

LOGS = LogSettings(levels=Levels(level="info"))
FEED = '[[rule]]\nname = "feed"\ninput = "239.1.1.1:5000%eth0"\noutput = "239.2.2.2:6000%eth1"\n'


def read_texts(*texts: str) -> Configuration:
    return read((f"{number}.toml", text.encode()) for number, text in enumerate(texts))


def problems(*texts: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_texts(*texts)
    assert caught.value.exit_code == 78
    return [str(problem) for problem in caught.value.problems]


def test_an_empty_file_says_nothing() -> None:
    assert read_texts("# nothing\n") == Configuration(Settings(), ())


def test_a_file_has_settings_and_rules() -> None:
    found = read_texts(
        '[daemon]\ncores = "0,2"\n[interface."vlan.7"]\nring_mib = 64\n[worker.1]\nbusy_poll = true\n' + FEED
    )
    assert found.settings.daemon.cores == "0,2"
    assert found.settings.interface["vlan.7"].ring_mib == 64
    assert found.settings.worker["1"].busy_poll
    assert found.rules == (parse_rule("239.1.1.1:5000%eth0", ["239.2.2.2:6000%eth1"], "feed"),)


def test_later_files_replace_settings_and_add_rules() -> None:
    other = '[daemon]\nworkers = 3\n[log.levels]\nlinks = "debug"\n' + FEED.replace("239.1.1.1", "239.1.1.9").replace(
        '"feed"', '"other"'
    )
    found = read_texts('[daemon]\nworkers = 2\nring_mib = 8\n[log.levels]\nclients = "error"\n' + FEED, other)
    assert (found.settings.daemon.workers, found.settings.daemon.ring_mib) == (3, 8)
    assert found.settings.log.levels == {"clients": "error", "links": "debug"}
    assert [rule.name for rule in found.rules] == ["feed", "other"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\n[daemon]\nwrokers = 1\n", "0.toml:3: unknown key 'wrokers' in [daemon]; did you mean 'workers'?"),
        ("[deamon]\n", "0.toml:1: unknown key 'deamon'; did you mean 'daemon'?"),
        ("zzz = 1\n", "known are: daemon, log, metrics, events, interface, worker, rule"),
        ('[daemon]\nworkers = "2"\n', "0.toml:2: daemon.workers: expected a whole number, got a text in quotes"),
        ("a = " + "1" * 5000, "this is not TOML"),
        ("[daemon]\nworkers = 0\n", "0.toml:2: daemon.workers: expected a whole number >= 1"),
        (
            "[daemon]\nengine = 'fast'\n",
            "0.toml:2: daemon.engine: there is no 'fast'; known are: auto, uring, reference",
        ),
        ("[daemon]\nengine = 'urin'\n", "0.toml:2: daemon.engine: there is no 'urin'; did you mean 'uring'?"),
        ("[log]\nlevel = 'warn'\n", "0.toml:2: log.level: there is no 'warn'; did you mean 'warning'?"),
        ("[log.levels]\nlinks = 'warn'\n", "0.toml:2: log.levels.links: there is no 'warn'; did you mean 'warning'?"),
        ("[daemon]\nsocket = 'run/x'\n", "0.toml:2: daemon.socket 'run/x' is not possible; give an absolute path"),
        ("[daemon]\nsocket = ''\n", "0.toml:2: daemon.socket '' is not possible; give an absolute path"),
        ("[daemon]\nsocket = '/" + "x" * 107 + "'\n", "is not possible; give an absolute path of up to 107 bytes"),
        ("[daemon]\nsocket = '/a\\u0000'\n".replace("'", '"'), "0.toml:2: daemon.socket '/a\\x00' is not possible"),
        (
            "[daemon]\nuser = 'root'\n",
            "0.toml:2: daemon.user root: workers do not run as root; name an unprivileged user",
        ),
        ("[daemon]\nuser = ''\n", "0.toml:2: daemon.user is empty; name an unprivileged user, or leave it out"),
        ("\ufeff[daemon]\n", "0.toml:1: this begins with a byte order mark; save the file as UTF-8 without one"),
        ('"a\\nb" = 1\n', "unknown key 'a\\nb'; known are: "),
        ('[interface."eth 0"]\n', "0.toml:1: [interface]: 'eth 0' is not an interface name; 'ip -brief link' lists"),
        ("[interface." + "e" * 16 + "]\n", "is not an interface name; "),
        ('[interface."eth+"]\n', "0.toml:1: [interface]: 'eth+' is a pattern; give each interface a table of its own"),
        ("[daemon]\nworkers = 1\ncores = '1'\n", "daemon.workers and daemon.cores are both given; keep one"),
        (
            "[interface.eth0]\nring_mb = 1\n",
            "0.toml:2: unknown key 'ring_mb' in [interface.eth0]; did you mean 'ring_mib'?",
        ),
        ("[worker.x]\n", "0.toml:1: there is no worker 'x'; workers have numbers, from 0 on"),
        ("[daemon]\nrootless = true\nworkers = 2\n", "0.toml:3: daemon.rootless has one data plane worker"),
        (
            "[daemon]\nrootless = true\n[[rule]]\ninput = '239.1.0.0/16:5000%eth0'\noutput = '=:=%eth1'\n",
            "0.toml:3: input '239.1.0.0/16:5000%eth0' is not possible with --rootless",
        ),
        (
            "[[rule]]\ninput = '239.1.1.1:5%eth0'\nname = '-'\noutput = '=:6%eth1'\n",
            "0.toml:3: name '-' is not possible",
        ),
        ("[daemon]\nrootless = true\nring_mib = 8\n", "0.toml:3: daemon.ring_mib is about packet rings, of which --"),
        ("[worker.007]\n", "0.toml:1: there is no worker '007'; workers have numbers, from 0 on"),
        ("[daemon]\nworkers = 2\n[worker.2]\n", "0.toml:3: [worker.2]: there are workers 0 to 1; remove it"),
        ("[daemon]\ncores = '0,5'\n[worker.2]\n", "0.toml:3: [worker.2]: there are workers 0 to 1; remove it"),
        ("[daemon]\ncores = '0-x'\n", "0.toml:2: daemon.cores '0-x' is not a list of cores; write, for example, 0,2-3"),
        ("[daemon]\ncores = '1,1'\n", "0.toml:2: daemon.cores '1,1' names a core twice"),
        (
            "[events]\nsilent_s = 9\nstopped_s = 8\n",
            "0.toml:3: events.stopped_s is 8, and events.silent_s 9; a flow is",
        ),
        ("[events]\nsilent_s = 0\n", "0.toml:2: events.silent_s: expected a number >= 1.0"),
        ("[log.levels]\nlinsk = 'debug'\n", "0.toml:2: there is no component 'linsk'; did you mean links or"),
        (
            "[metrics]\nlisten = '9478'\n",
            "0.toml:2: metrics.listen '9478' is not ADDRESS:PORT; write, for example, 127",
        ),
        ("[metrics]\nlisten = 9478\n", "0.toml:2: metrics.listen: expected"),
        ("daemon = 3\n", "0.toml:1: daemon: expected a table, got a whole number"),
        ("[rule]\n", "0.toml:1: rule: expected a list, got a table; write [[rule]] for each"),
        ("x = [1,\n", "0.toml:2: this is not TOML: "),
        ("[daemon]\nworkers = 1\nworkers = 2\n", "0.toml:3: this is not TOML: cannot overwrite a value"),
        ("a = '\xe4", "0.toml:1: this is not TOML"),
        (FEED + "[[rule]]\noutput = '=:6%eth1'\n", "0.toml:5: there is no 'input' in [[rule]]; add it"),
        (FEED.replace("name", "nmae"), "0.toml:2: unknown key 'nmae' in [[rule]]; did you mean 'name'?"),
        (FEED.replace("239.1.1.1:", "239.1.1:"), "0.toml:3: input '239.1.1:5000%eth0': "),
        (FEED.replace('"239.2.2.2:6000%eth1"', '[\n"239.2.2.3:1%eth1",\n "nonsense"]'), "0.toml:6: output 'nonsense'"),
        (FEED.replace('"239.2.2.2:6000%eth1"', "7"), "0.toml:4: rule.output: expected"),
        (FEED + FEED, "0.toml:7: input '239.1.1.1:5000%eth0' is also that of the rule at 0.toml:1"),
        (
            FEED + FEED.replace("239.1.1.1", "239.1.1.2"),
            "0.toml:6: the name 'feed' is also that of the rule at 0.toml:1",
        ),
        (
            FEED + '[[rule]]\ninput = "239.2.2.2:6000%eth1"\noutput = "239.1.1.1:5000%eth0"\n',
            "0.toml:1: rule feed closes a cycle",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_a_remedy(text: str, says: str) -> None:
    (problem,) = problems(text)
    assert says in problem
    assert "; " in problem


def test_all_that_is_wrong_is_said_at_once() -> None:
    found = problems("[daemon]\nworkers = 'x'\n" + FEED.replace("eth1", ""), "[log]\nlevel = 'loud'\n[x]\n")
    assert [problem.split(": ")[0] for problem in found] == ["0.toml:2", "0.toml:6", "1.toml:2", "1.toml:3"]
    found = problems("[log.levels]\nfoo = 'debug'\nlinks = 'loud'\nactive = 7\n")
    assert [problem.split(": ")[0] for problem in found] == ["0.toml:2", "0.toml:3", "0.toml:4"]
    found = problems("[daemon]\nworkers = 'x'\nengin = 'uring'\nring_mib = 0\n[[rule]]\noutput = 5\n")
    assert [problem.split(": ")[0] for problem in found] == ["0.toml:2", "0.toml:3", "0.toml:4", "0.toml:5", "0.toml:6"]


def test_a_command_line_may_say_how_many_workers_there_are() -> None:
    text = b"[daemon]\nworkers = 1\n[worker.1]\nbusy_poll = true\n"
    assert read([("x", text)], alone=False).settings.worker["1"].busy_poll
    with pytest.raises(ConfigError, match=r"\[worker.1\]: there are workers 0 to 0"):
        read([("x", text)])


def test_a_default_gives_way_to_what_is_given() -> None:
    assert read([("x", b"[events]\nsilent_s = 90\n")]).settings.events.silent_s == 90


def test_not_more_is_said_than_people_read() -> None:
    assert len(problems("[[rule]]\n" * 10_000)) == PROBLEMS_MAX


def test_of_too_many_rules_the_first_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "RULES_MAX", 2)
    (problem,) = problems("".join(FEED.replace("feed", f"f{n}").replace("239.1.1.1", f"239.1.1.{n}") for n in range(9)))
    assert problem == "0.toml:9: from here on there are too many rules; at most 2 are possible"


def test_a_problem_is_one_line_whatever_the_file_is_called() -> None:
    with pytest.raises(ConfigError) as caught:
        read([("a\nb\x1b.toml", b"x = 1")])
    assert str(caught.value.problems[0]).startswith("a?b?.toml:1: unknown key 'x'")


def test_a_file_that_is_not_text() -> None:
    with pytest.raises(ConfigError) as caught:
        read([("x", b"[daemon]\n\xff\n")])
    assert str(caught.value).startswith("x:2: this is not UTF-8")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_refused(content: bytes) -> None:
    with contextlib.suppress(ConfigError):
        read([("x", content)])


SHAPES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["daemon", "rule", "input", "output", "interface", "worker", "0", "log", "levels", "x.y"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*Settings.__struct_fields__, "x"]), SHAPES, max_size=3))
def test_any_values_are_a_configuration_or_refused(values: dict[str, object]) -> None:
    try:
        text = tomlkit.dumps(values)
    except Exception:  # no TOML has that
        return
    with contextlib.suppress(ConfigError):
        read([("x", text.encode())])


def test_the_lines_of_rules_end_with_their_last_key() -> None:
    text = f"# a\n{FEED}# of what follows\n\n{FEED}\n# end\n[log]\n"
    assert rule_tables(text.encode()) == [range(2, 6), range(8, 12)]


# --- files -----------------------------------------------------------------------------------------------------------


def test_drop_ins_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    main = tmp_path / "m.toml"
    main.write_text("[daemon]\nworkers = 1\n")
    (tmp_path / "conf.d").mkdir()
    for name, workers in (("20.toml", 3), ("10.toml", 2), ("30.toml.off", 4), (".40.toml", 5)):
        (tmp_path / "conf.d" / name).write_text(f"[daemon]\nworkers = {workers}\n")
    assert config_files.load(str(main)).settings.daemon.workers == 3


def test_files_that_cannot_be_had(tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileError, match=r"cannot read .*: No such file"):
        config_files.load(str(tmp_path / "none.toml"))
    with pytest.raises(FileError, match="is not a file"):
        config_files.load(str(tmp_path))
    os.mkfifo(tmp_path / "fifo.toml")
    with pytest.raises(FileError, match="is not a file"):
        config_files.load(str(tmp_path / "fifo.toml"))
    long = tmp_path / "long.toml"
    long.write_bytes(b"#" * (config_files.SIZE_MAX + 1))
    with pytest.raises(FileError, match="is longer than"):
        config_files.load(str(long))
    (tmp_path / "conf.d").touch()
    with pytest.raises(FileError, match=r"cannot read .*/conf.d: Not a directory"):
        config_files.read_files(str(long))
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize(("name", "text"), [("-", FEED), ("/dev/stdin", "[deamon]\n")])
def test_standard_input_may_be_checked(name: str, text: str) -> None:
    done = run_program(["check", name], timeout=20, input=text)
    if text == FEED:
        assert (done.returncode, done.stdout) == (0, f"{name}: fine, 1 rule\n")
    else:
        assert (done.returncode, done.stdout) == (78, "")
        assert done.stderr.startswith(f"mcrelay: {name}:1: unknown key 'deamon'")


def test_what_only_this_host_lacks_is_a_note() -> None:
    text = "[daemon]\nuser = 'nobody-of-that-name'\ncores = '4095'\n"
    done = run_program(["check", "-"], timeout=20, input=text)
    assert (done.returncode, done.stdout) == (0, "-: fine, 0 rules\n")
    assert [line.partition(": there")[0].partition(": core")[0] for line in done.stderr.splitlines()] == [
        "mcrelay: note: -:3: daemon.cores 4095",
        "mcrelay: note: -:2: daemon.user nobody-of-that-name",
    ]
    document = json.loads(run_program(["check", "-", "--json"], timeout=20, input=text).stdout)
    assert (document["problems"], [remark["line"] for remark in document["remarks"]]) == ([], [3, 2])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's files are looked at")
def test_root_s_daemon_takes_no_file_that_others_can_write(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.touch()
    file.chmod(0o646)
    with pytest.raises(FileError, match="could be written by others"):
        config_files.load(str(file))
    file.chmod(0o664)
    os.chown(file, -1, 65534)
    with pytest.raises(FileError, match="could be written by others"):
        config_files.load(str(file))
    file.chmod(0o644)
    config_files.load(str(file))
    os.chown(file, 65534, -1)
    with pytest.raises(FileError, match="could be written by others"):
        config_files.load(str(file))
    assert config_files.read_files(str(file)) == [(str(file), b"")]  # a command may look at it
    # But what lies beside it is to be of the same hand, or root's.
    (tmp_path / "conf.d").mkdir()
    drop_in = tmp_path / "conf.d" / "other.toml"
    drop_in.touch()
    assert len(config_files.read_files(str(file))) == 2
    os.chown(drop_in, 65534, -1)
    assert len(config_files.read_files(str(file))) == 2
    os.chown(drop_in, 0, 65533)
    drop_in.chmod(0o664)
    with pytest.raises(FileError, match=r"other\.toml could be"):
        config_files.read_files(str(file))
    drop_in.chmod(0o644)
    os.chown(drop_in, 65533, -1)
    with pytest.raises(FileError, match=r"other\.toml could be written by others than root and whoever owns the file"):
        config_files.read_files(str(file))


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "mcrelay.toml").touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/conf.d/\xff.toml")).touch()
    for read_all in (config_files.read_files, config_files.load):
        with pytest.raises(FileError, match="is not UTF-8"):
            read_all(str(tmp_path / "mcrelay.toml"))


# --- differences -----------------------------------------------------------------------------------------------------

A = parse_rule("239.1.1.1:5000%eth0", ["239.2.2.2:6000%eth1", "239.2.2.3:6000%eth1"], "a")
B = parse_rule("239.1.1.2:5000%eth0", ["239.2.2.4:6000%eth1"], "b")


def test_what_is_equal_but_for_order_makes_no_difference() -> None:
    turned = parse_rule("239.1.1.1:5000%eth0", ["239.2.2.3:6000%eth1", "239.2.2.2:6000%eth1"], "a")
    found = difference([A, B], [B, turned])
    assert not found
    assert found.summary() == "nothing to change"


def test_a_difference_says_what_goes_and_what_comes() -> None:
    other = parse_rule("239.1.1.1:5000%eth0", ["239.2.2.2:6000%eth1", "239.2.2.9:6000%eth1"], "c")
    found = difference([A, B], [other])
    assert (found.adds, found.removes) == ((other,), (B, A))
    assert list(found.lines()) == [
        "- b  239.1.1.2:5000%eth0 -> 239.2.2.4:6000%eth1",
        "  a  239.1.1.1:5000%eth0",
        "-   name a",
        "+   name c",
        "-   -> 239.2.2.3:6000%eth1",
        "+   -> 239.2.2.9:6000%eth1",
    ]
    assert found.summary() == "1 removed, 1 changed"


# --- options ---------------------------------------------------------------------------------------------------------


def test_the_command_line_counts_more_than_the_file() -> None:
    loaded = read_texts('[daemon]\nworkers = 1\nring_mib = 8\nbusy_poll = true\nrestore = false\nsocket = "/x"\n')
    core = str(min(os.sched_getaffinity(0)))
    given = {"cores": core, "ring_mib": 4, "busy_poll": False, "rootless": False, "socket": None}
    options = make_options(loaded, "m.toml", given, LOGS, restore=None)
    assert options.cores == (int(core),)
    assert options.ring_memory == 4 * 2**20
    assert options.busy_poll
    assert not options.restore
    assert options.socket == "/x"
    assert options.config == os.path.abspath("m.toml")


def test_where_metrics_are_served_is_said_by_the_file_or_the_command_line() -> None:
    loaded = read_texts('[metrics]\nlisten = "[::1]:9478"\nrules_max = 5\n')
    options = make_options(loaded, "m.toml", {}, LOGS, restore=None)
    assert (options.metrics, options.metrics_rules) == (("::1", 9478), 5)
    given = {"metrics": "127.0.0.1:1", "metrics_rules": 0}
    options = make_options(loaded, "m.toml", given, LOGS, restore=None)
    assert (options.metrics, options.metrics_rules) == (("127.0.0.1", 1), 0)
    options = make_options(read_texts(""), None, {}, LOGS, restore=None)
    assert (options.metrics, options.metrics_rules) == (None, 1000)


def test_interfaces_and_workers_have_settings_of_their_own() -> None:
    text = "[interface.eth0]\nring_mib = 2\n[interface.eth1]\n[worker.0]\nbusy_poll = true\nlatency_budget_us = 7\n"
    options = make_options(read_texts(text), "x", {}, LOGS, restore=None)
    assert options.ring_memories() == {"eth0": 2 * 2**20}
    assert options.of_worker(0) == (7, True)
    assert options.of_worker(1) == (options.latency_budget_us, False)


def test_a_worker_that_is_not_there_has_no_settings() -> None:
    with pytest.raises(ConfigError, match=r"0.toml:2: \[worker.63\]: there are workers 0 to 0"):
        make_options(read_texts("\n[worker.63]\n"), "x", {"workers": 1}, LOGS, restore=None)


@pytest.mark.parametrize(
    ("text", "given", "refusal", "code"),
    [
        ("workers = 64\n", {}, "0.toml:2: daemon.workers 64: there is one worker per core", 78),
        ("cores = '4095'\n", {}, "0.toml:2: daemon.cores 4095: core 4095 is not there for us", 78),
        ("user = 'nobody-of-that-name'\n", {}, "0.toml:2: daemon.user nobody-of-that-name: there is no such user", 78),
        ('user = "a\\u0000"\n', {}, "0.toml:2: daemon.user 'a\\x00': there is no such user", 78),
        ("ring_mib = 7\n", {"rootless": True}, "0.toml:2: daemon.ring_mib is about packet rings", 78),
        ("user = 'daemon'\n", {"rootless": True}, "0.toml:2: daemon.user daemon: only root can run workers as", 78),
        ("user = 'daemon'\n", {"rootless": True, "user": "bin"}, "--user bin: only root can run workers as", 64),
        ("cores = '0,1'\n", {"rootless": True}, "0.toml:2: --rootless has one data plane worker", 78),
        ("workers = 64\n", {"workers": 63}, "--workers 63: there is one worker per core", 64),
        ("ring_mib = 7\n", {"rootless": True, "ring_mib": 3}, "--ring-mib is about packet rings", 64),
    ],
)
def test_what_this_host_does_not_have_is_the_fault_of_whoever_said_it(
    text: str, given: dict[str, object], refusal: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    with pytest.raises(Error) as caught:
        make_options(read_texts("[daemon]\n" + text), "x", given, LOGS, restore=None)
    assert (str(caught.value).startswith(refusal), caught.value.exit_code) == (True, code), str(caught.value)


def test_what_counts_only_after_a_restart_is_known() -> None:
    before = read_texts("[daemon]\nworkers = 1\n[interface.eth0]\nring_mib = 1\n[events]\nsilent_s = 9\n").settings
    after = read_texts("[daemon]\nworkers = 2\n[log]\nformat = 'json'\nlevel = 'debug'\n").settings
    assert after.changes_at_start(before) == ["daemon.workers", "interface.eth0", "log.format"]


def test_the_schema_is_that_of_the_tree() -> None:
    """For editors. 'mcrelay schema > docs/mcrelay.schema.json' renews it."""
    tree = Path(__file__).parents[2] / "docs" / "mcrelay.schema.json"
    assert json.loads(tree.read_text()) == json.loads(json.dumps(schema()))
