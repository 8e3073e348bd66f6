"""The command `perdure audit`: bounds, shadow models, and replays without a record."""

from helpers.command_line import CONFIG, assert_refused, plain


def test_audit_prints_the_lower_bound_and_the_claimed_epsilon(command, tmp_path):
    claim = "\n[privacy]\nnoise_multiplier = 2.0\ndelta = 0.0005\nsampling_rate = 0.5\nseed = 0\n"
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.replace("[[arms]]", f"{claim}[[arms]]") + "private = true\n")
    code, out, err = command("audit", path, "--canaries", 200)
    assert (code, err) == (0, "")
    told = plain(out)
    assert "naive-private: epsilon is at least" in told
    assert "with 99 % confidence; claimed:" in told
    assert "(record, add/remove, delta 0.0005)" in told
    assert "simulated noise" in told


def test_audit_with_shadows_attacks_the_models_of_a_run(command, tmp_path):
    claim = "\n[privacy]\nnoise_multiplier = 2.0\ndelta = 0.0005\nsampling_rate = 0.5\nseed = 0\n"
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.replace("[[arms]]", f"{claim}[[arms]]") + "private = true\n")
    assert_refused(
        command("audit", path, "--shadows", 4), "--shadows", "the folder of a finished run"
    )
    assert command("run", path)[0] == 0
    code, out, err = command("audit", "runs/small", "--canaries", 200, "--shadows", 4)
    assert (code, err) == (0, "")
    assert "naive-private: membership inference (LiRA, 4 shadow models," in plain(out)


def test_audit_refuses_a_config_without_private_arms(command, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(CONFIG)
    assert_refused(command("audit", path), "arms", "at least one with private = true")


REPLAYED = """
[privacy]
noise_multiplier = 2.0
clip_norm = 0.1
delta = 0.0005

[[arms]]
strategy = "ewc"
strength = 1.0
private = true
"""


def test_audit_replay_prints_the_change_of_every_release(command, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.replace("epochs = 1", "iterations = 3") + REPLAYED)
    code, out, err = command("audit", path, "--replay")
    assert (code, err) == (0, "")
    told = plain(out)
    for cell in ("strategy", "clipping", "place", "release", "ratio", "unexplained"):
        assert cell in told
    assert "release:fisher" in told and "gradient" in told and "alone" in told
    assert "ewc-private: every change is at most as large as charged" in told
    assert [file.name for file in tmp_path.iterdir()] == ["small.toml"]


def test_audit_replay_of_a_federation_names_the_clients(command, tmp_path):
    federation = "\n[federation]\nclients = 2\nrounds = 1\nmin_size = 1\n"
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.replace("epochs = 1", "iterations = 3") + federation + REPLAYED)
    code, out, err = command("audit", path, "--replay")
    assert (code, err) == (0, "")
    assert "client 0" in plain(out) and "client 1" in plain(out)


def test_audit_replay_exits_with_1_if_a_record_changes_outputs(command, tmp_path, monkeypatch):
    """The sum is divided by the number of records in the step, so the parameters depend on it."""
    from perdure.curator.local_curator import LocalCurator

    real = LocalCurator.gradient

    def gradient(curator, losses, params, batch, step):
        return {n: v / len(batch) for n, v in real(curator, losses, params, batch, step).items()}

    monkeypatch.setattr(LocalCurator, "gradient", gradient)
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.replace("epochs = 1", "iterations = 3") + REPLAYED)
    code, out, err = command("audit", path, "--replay")
    assert (code, err) == (1, "")
    told = plain(out)
    assert "ewc-private: alone: model.head.weight differs without a release" in told
    assert "ewc-private: model.safetensors, model.head.weight differs without a release" in told


def test_audit_replay_refuses_an_unknown_record_id(command, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(CONFIG + REPLAYED)
    answer = command("audit", path, "--replay", "--record", 10**6)
    assert_refused(answer, "record = 1000000", "an id of a training record")
    assert_refused(command("audit", path, "--record", 1), "--record = 1", "together with --replay")
    answer = command("audit", path, "--replay", "--shadows", 4)
    assert_refused(answer, "--shadows = 4", "without --replay")
