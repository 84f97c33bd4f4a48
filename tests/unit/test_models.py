"""The model catalogue: its facts, and what MODEL stands for."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from memplan.catalog import models
from memplan.catalog.models import DEFAULT_MODEL, find_default_model, find_model, read_config, read_models
from memplan.catalog.profiles import profile_path
from memplan.errors import ConfigError, MemplanError, UnknownModelError, UsageError

SMALL = {"model_type": "llama", "hidden_size": 64}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No caches, no tokens, no hub but the one a test starts, in an empty folder."""
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "MEMPLAN_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(models, "TIMEOUT_S", 2)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers `/org/<name>/resolve/main/config.json` with what the test put into `answers`."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        status, body, headers = self.server.answers.get(self.path, (404, b"", {}))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve(answers):
    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    server.answers, server.asked = answers, []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture
def hub(monkeypatch):
    server = serve({})
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    yield server
    server.shutdown()
    server.server_close()


def offer(hub, name, body, status=200, **headers):
    hub.answers[f"/{name}/resolve/main/config.json"] = (status, body, headers)


# -- the catalogue -----------------------------------------------------------------------------------------------------


def test_every_config_has_a_row_and_every_row_a_config():
    files = {file for file in os.listdir(profile_path("models")) if file.endswith(".json")}
    assert files == {model.file for model in read_models()}
    assert len(files) > 100


def test_every_config_can_be_read_and_says_its_model_type():
    for model in read_models():
        values, origin = read_config(model.id)
        assert origin == model.id
        assert values.get("model_type", model.model_type) == model.model_type


def test_no_name_stands_for_two_models():
    names = [name for model in read_models() for name in (model.id.lower(), *model.aliases)]
    assert len(names) == len(set(names))
    assert all(name == name.lower() for name in names)


def test_rows_are_plain_commas_and_say_where_the_config_comes_from():
    for model in read_models():
        assert '"' not in ",".join(model.aliases) + model.note + model.status
        assert model.config_kind in {"vendored", "constructed", "vendored+patched"}
        assert model.aliases
        assert model.parameters > 10**6


@pytest.mark.parametrize(
    ("typed", "model_id"),
    [
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("META-LLAMA/meta-llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        (" gpt2 ", "openai-community/gpt2"),
        ("bert-large", "google-bert/bert-large-uncased"),
    ],
)
def test_ids_and_aliases_in_any_case(typed, model_id):
    assert find_model(typed).id == model_id
    assert read_config(typed)[1] == model_id


def test_a_row_says_whether_a_formula_answers():
    assert find_model("llama-3-8b").is_modelled
    assert not find_model("flux").is_modelled


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_or_the_folder_that_holds_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert read_config(str(tmp_path)) == (SMALL, str(tmp_path))
    assert read_config(str(tmp_path / "config.json")) == (SMALL, str(tmp_path / "config.json"))


def test_a_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(SMALL).encode())
    assert read_config(str(tmp_path / "c.json"))[0] == SMALL


def test_what_lies_on_disk_goes_before_the_catalogue(tmp_path):
    os.makedirs("gpt2")
    assert read_config("gpt2")[0]["model_type"] == "gpt2"  # a folder without a config.json is no model
    with open("gpt2/config.json", "w") as file:
        json.dump(SMALL, file)
    assert read_config("gpt2") == (SMALL, "gpt2")


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert read_config("~/config.json")[0] == SMALL


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b'{\n"a": 1,\n}', "in line 3"),
        (b"", "not valid JSON"),
        (b"[1]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number that no config has"),
        (b"[" * 200_000, "nested too deeply"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b" " * (4 * 2**20 + 1), "larger than 4 MiB"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, cause):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=cause) as fault:
        read_config(str(tmp_path / "config.json"))
    assert "config.json" in fault.value.cause
    assert fault.value.cure


@pytest.mark.parametrize(
    ("name", "kind", "cause"),
    [
        ("", UsageError, "empty"),
        ("  ", UsageError, "empty"),
        ("missing.json", MemplanError, "no file or folder missing.json"),
        ("./nowhere", MemplanError, "no file or folder"),
        ("/a/b/c", MemplanError, "no file or folder"),
        (".", MemplanError, "holds no config.json"),
        ("no-such-model", UnknownModelError, "No model is known"),
        ("a\x00b", UnknownModelError, "No model is known"),
        ("x" * 5000, UnknownModelError, "No model is known"),
        ("org/na me", UnknownModelError, "No model is known"),
        ("org/..", UnknownModelError, "No model is known"),
        ("org/mödel", UnknownModelError, "No model is known"),
    ],
)
def test_a_name_that_stands_for_nothing(name, kind, cause):
    with pytest.raises(kind, match=cause) as fault:
        read_config(name)
    assert fault.value.cure


def test_near_names_are_offered():
    with pytest.raises(UnknownModelError) as fault:
        read_config("lama-3-8b")
    assert "llama-3-8b" in fault.value.cure


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0)
    with pytest.raises(MemplanError, match="cannot be read"):
        read_config(str(tmp_path))


def test_a_folder_named_config_json(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(MemplanError, match="cannot be read"):
        read_config(str(tmp_path))


# -- the hub -----------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_fetched_once_and_kept(hub, tmp_path):
    offer(hub, "org/new-model", json.dumps(SMALL).encode())
    assert read_config("org/new-model") == (SMALL, "org/new-model")
    assert read_config("org/new-model") == (SMALL, "org/new-model")
    assert hub.asked == [("/org/new-model/resolve/main/config.json", None)]
    assert os.listdir(tmp_path / "cache" / "configs") == ["org--new-model.json"]


def test_the_token_goes_to_the_hub_and_not_beyond_a_redirect(hub, monkeypatch):
    other = serve({"/elsewhere": (200, json.dumps(SMALL).encode(), {})})
    monkeypatch.setenv("HF_TOKEN", "secret")
    offer(hub, "org/moved", b"", 302, Location=f"http://127.0.0.1:{other.server_port}/elsewhere")
    try:
        assert read_config("org/moved")[0] == SMALL
    finally:
        other.shutdown()
        other.server_close()
    assert hub.asked[0][1] == "Bearer secret"
    assert other.asked == [("/elsewhere", None)]


@pytest.mark.parametrize(
    ("status", "body", "kind", "cause"),
    [
        (404, b"", UnknownModelError, "no config.json"),
        (401, b"", UnknownModelError, "not public"),
        (403, b"", UnknownModelError, "not public"),
        (500, b"", MemplanError, "answered 500"),
        (200, b"<html>", ConfigError, "not valid JSON"),
        (200, b"[]", ConfigError, "holds a JSON list"),
        (200, b" " * (4 * 2**20 + 1), ConfigError, "larger than"),
    ],
)
def test_an_answer_that_is_no_config(hub, tmp_path, status, body, kind, cause):
    offer(hub, "org/m", body, status)
    with pytest.raises(kind, match=cause) as fault:
        read_config("org/m")
    assert fault.value.cure
    assert not (tmp_path / "cache").exists()


def test_a_hub_that_cannot_be_reached(monkeypatch):
    with pytest.raises(MemplanError, match="could not be asked"):
        read_config("org/m")
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    with pytest.raises(MemplanError, match="HF_ENDPOINT"):
        read_config("org/m")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:port")
    with pytest.raises(MemplanError, match="could not be asked"):
        read_config("org/m")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "MEMPLAN_OFFLINE"])
def test_offline_nothing_is_fetched_and_what_was_kept_is_read(hub, monkeypatch, variable):
    offer(hub, "org/kept", json.dumps(SMALL).encode())
    read_config("org/kept")
    monkeypatch.setenv(variable, "1")
    assert read_config("org/kept")[0] == SMALL
    with pytest.raises(UnknownModelError, match=variable):
        read_config("org/other")
    assert len(hub.asked) == 1


def test_the_hubs_own_cache_goes_first_and_its_main_revision(hub, tmp_path):
    snapshots = tmp_path / "hf" / "hub" / "models--org--m" / "snapshots"
    for number, revision in enumerate(("old", "new")):
        (snapshots / revision).mkdir(parents=True)
        (snapshots / revision / "config.json").write_text(json.dumps({"revision": revision}))
        os.utime(snapshots / revision / "config.json", (number, number))
    assert read_config("org/m")[0] == {"revision": "new"}
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("old")
    assert read_config("org/m")[0] == {"revision": "old"}
    assert hub.asked == []


def test_a_cache_that_cannot_be_written_is_none(hub, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    offer(hub, "org/m", json.dumps(SMALL).encode())
    assert read_config("org/m")[0] == SMALL


def test_a_damaged_cache_is_fetched_again(hub, tmp_path):
    offer(hub, "org/m", json.dumps(SMALL).encode())
    read_config("org/m")
    (tmp_path / "cache" / "configs" / "org--m.json").write_text("{")
    assert read_config("org/m")[0] == SMALL
    assert len(hub.asked) == 2


# -- the default -------------------------------------------------------------------------------------------------------


def test_without_files_the_documented_default():
    assert find_default_model()[0] == DEFAULT_MODEL
    assert find_model(DEFAULT_MODEL).id == DEFAULT_MODEL


def test_the_nearest_file_that_names_a_model(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "deep" / "deeper").mkdir(parents=True)
    (project / "pyproject.toml").write_text('[tool.memplan]\nmodel = "gpt2"\n')
    monkeypatch.chdir(project / "deep" / "deeper")
    assert find_default_model() == ("gpt2", str(project / "pyproject.toml"))
    (project / "deep" / "memplan.toml").write_text('gpu = "t4"\n')
    assert find_default_model()[0] == "gpt2"
    (project / "deep" / "memplan.toml").write_text('model = "llama-3-8b"\n')
    assert find_default_model() == ("llama-3-8b", str(project / "deep" / "memplan.toml"))


def test_a_path_is_relative_to_the_file_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "memplan.toml").write_text('model = "mine"\n')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(SMALL))
    name, _ = find_default_model()
    assert name == str(tmp_path / "mine")
    assert read_config(name)[0] == SMALL
    (tmp_path / "memplan.toml").write_text('model = "./gone.json"\n')
    assert os.path.normpath(find_default_model()[0]) == str(tmp_path / "gone.json")


def test_a_project_file_of_others_is_passed_over(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.other]\nmodel = "x"\n[broken')
    assert find_default_model()[0] == DEFAULT_MODEL


@pytest.mark.parametrize("content", ["model = 3\n", 'model = " "\n', "model = [\n", "model = ['x']\n"])
def test_a_default_that_is_no_name(tmp_path, content):
    (tmp_path / "memplan.toml").write_text(content)
    with pytest.raises(MemplanError, match=r"memplan\.toml"):
        find_default_model()


def test_importing_the_catalogue_loads_no_parser_and_no_network():
    code = (
        "import sys, memplan.catalog.models as m; m.find_model('gpt2');"
        "print(sorted({'json', 'tomllib', 'urllib.request', 'pathlib', 'csv', 'difflib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
