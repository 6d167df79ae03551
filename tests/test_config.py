"""Arguments: how they are read, what they become, and what is said about wrong ones."""

from types import FunctionType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from app.arguments import ConfigError, arguments_of, list_arguments
from app.config import AppConfig
from deployments.engine.config import EngineConfig, SpeculationConfig
from deployments.errors import UnsupportedModelError
from deployments.load.admission import Bounds


def read(*pairs: str) -> AppConfig:
    return AppConfig.model_validate(dict(pair.split("=", 1) for pair in pairs))


def refusal(*pairs: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*pairs)
    return str(caught.value)


GUESSING = "engine.speculation.method=draft_model", "engine.speculation.model=/small"
# Texts, and what reads as a number but is none that a machine has.
_VALUES = st.text(min_size=1) | st.sampled_from(["inf", "-inf", "nan", "1e300", "-1", "0", "1e-9", str(10**30)])


class Nothing:
    """A deployment with nothing in it, to see what Serve makes of the options."""


def test_no_arguments_need_two_cores_and_no_gpu():
    config = read()
    assert config.max_num_cpus() <= 2
    for pool in ("prefill", "decode"):
        assert config.deployment_options(pool)["placement_group_bundles"] == [{"CPU": 0.1}, {"CPU": 0.8}]


def test_what_a_machine_lacks_is_said_with_who_asks_for_it():
    both = read("prefill.num_gpus=1", "decode.num_gpus=0.5", "decode.min_replicas=2", "decode.max_replicas=2")
    said = "prefill.num_gpus=1 (engines: 1) and decode.num_gpus=0.5 (engines: 2): 2 GPU needed, and Ray finds {} here"
    assert both.what_lacks({"CPU": 2}) == said.format(0)
    assert both.what_lacks({"CPU": 2, "GPU": 1}) == said.format(1)
    assert both.what_lacks({"CPU": 2, "GPU": 2}) is None
    slots = read("decode.resources.slot=1", "mode=colocated")
    assert slots.what_lacks({"slot": 1}) is None, "there is no prefill pool"
    assert slots.what_lacks({}) == "decode.resources.slot=1 (engines: 1): 1 slot needed, and Ray finds 0 here"
    assert read().what_lacks({}) is None


def test_pools_that_sleep_need_what_wakes_them():
    asleep = read(
        "planner.enabled=true",
        "parity_check=false",
        "decode.min_replicas=0",
        "decode.num_gpus=1",
        "prefill.min_replicas=0",
        "prefill.num_gpus=1",
    )
    assert asleep.what_lacks({}) == "decode.num_gpus=1 (engines: 1): 1 GPU needed, and Ray finds 0 here"


def test_dotted_keys_reach_nested_fields_and_strings_become_their_types():
    config = read("prefill.max_replicas=4", "engine.enable_prefix_caching=false", "decode.engine.num_blocks=512")
    assert config.prefill.max_replicas == 4
    assert config.engine_config("prefill").enable_prefix_caching is False
    assert config.engine_config("decode").num_blocks == 512


def test_a_field_that_holds_a_mapping_takes_the_rest_of_the_key_whole():
    config = read("decode.node_labels.ray.io/zone=a", "decode.node_labels.pool=decode", "decode.resources.slot=1")
    assert config.decode.node_labels == {"ray.io/zone": "a", "pool": "decode"}
    assert config.decode.resources == {"slot": 1.0}


def test_nested_and_dotted_arguments_merge_and_the_callers_mapping_stays_as_it_was():
    given_values: dict[str, Any] = {"prefill": {"node_labels": {"pool": "prefill"}}, "prefill.node_labels.zone": "a"}
    assert AppConfig.model_validate(given_values).prefill.node_labels == {"pool": "prefill", "zone": "a"}
    assert given_values["prefill"] == {"node_labels": {"pool": "prefill"}}


def test_there_is_no_tier_without_room_for_it_and_none_without_prefix_caches():
    assert not read().tier.is_on
    tier = read("tier.max_bytes=1000", "tier.object_bytes=1000", "tier.copy_share=0.1").tier
    assert tier.is_on and tier.copy_share_on("cuda") == 0.1
    assert (read().tier.copy_share_on("cpu"), read().tier.copy_share_on("cuda")) == (0.02, 0.5)
    assert "tier.max_bytes" in refusal("tier.max_bytes=1000000000", "engine.enable_prefix_caching=false")
    assert "tier.num_shards" in refusal("tier.num_shards=0")
    assert "max_bytes is 1000, less than one object of 600 bytes" in refusal(
        "tier.max_bytes=1000", "tier.object_bytes=600", "tier.num_shards=2"
    )
    assert str(1 << 30) in refusal("tier.object_bytes=10000000000000")
    assert str(1 << 50) in refusal("tier.max_bytes=999999999999999999999999999999")
    with pytest.raises(UnsupportedModelError, match="none of them keeps an object of 1001 bytes"):
        tier.check_object(1001)


def test_origins_are_separated_by_commas_or_a_list():
    origins = ("https://a.example", "http://localhost:3000")
    assert read("ingress.cors_origins=https://a.example, http://localhost:3000").ingress.cors_origins == origins
    assert AppConfig.model_validate({"ingress": {"cors_origins": list(origins)}}).ingress.cors_origins == origins
    assert read("ingress.cors_origins=*").ingress.cors_origins == ("*",)


def test_an_argument_given_twice_is_refused():
    with pytest.raises(ConfigError, match=r"decode\.max_replicas is given twice: 2 and '3'"):
        AppConfig.model_validate({"decode": {"max_replicas": 2}, "decode.max_replicas": "3"})


@given(st.dictionaries(st.sampled_from([a.name for a in arguments_of(AppConfig)]), _VALUES, max_size=4))
def test_any_values_of_known_arguments_are_accepted_or_refused_in_words(values):
    try:
        AppConfig.model_validate(values)
    except ConfigError as error:
        assert "no such argument" not in str(error)  # noqa: PT017  either outcome is right, a third is not


@pytest.mark.parametrize(
    ("pair", "parts"),
    [
        ("prefil.max_replicas=4", ["prefil.max_replicas=4: no such argument", "did you mean prefill.max_replicas"]),
        ("num_blocks=4", ["num_blocks=4: no such argument", "did you mean engine.num_blocks?"]),
        ("decode.engine.num_block=4", ["decode.engine.num_block=4: no such", "decode.engine.num_blocks"]),
        ("zzz=1", ["zzz=1: no such argument"]),
        ("mode=fast", ["mode=fast: input should be 'disaggregated' or 'colocated'"]),
        ("engine.num_blocks=0", ["engine.num_blocks=0: input should be greater than or equal to 1"]),
        ("decode.max_replicas=many", ["decode.max_replicas=many: input should be a valid integer"]),
        ("engine.model=x", ["engine: both pools run one model; set the argument `model`"]),
        ("decode.min_replicas=2", ["decode: max_replicas (1) must be", "min_replicas (2)"]),
        ("prefill.autoscaling_config.delay=3", ["prefill: autoscaling_config.delay: Ray Serve's"]),
        (
            "prefill.autoscaling_config.upscale_delay_s=-1",
            ["prefill: autoscaling_config.upscale_delay_s=-1: Input should"],
        ),
        ("prefill.num_cpus=inf", ["prefill.num_cpus=inf: input should be a finite number"]),
        ("prefill.num_cpus=1e300", ["prefill.num_cpus=1e300: input should be less than or equal to 4096"]),
        ("ingress.num_cpus=0.00001", ["ingress.num_cpus=0.00001: must be 0 or at least 0.0001"]),
        ("decode.resources.slot=-1", ["decode.resources.slot=-1: input should be greater than or equal to 0"]),
        ("decode.resources.slot=nan", ["decode.resources.slot=nan: input should be a finite number"]),
        ("decode.resources.GPU=1", ["decode: resources.GPU=1: set `num_gpus` instead"]),
        ("routing.decode.tie=9", ["routing.decode.tie=9: input should be less than or equal to 1"]),
        ("routing.prefill.compute=1e308", ["compute=1e308: input should be less than or equal to 1000000"]),
        ("planner.itl_s=inf", ["planner.itl_s=inf: input should be a finite number"]),
        ("engine.lease_s=inf", ["engine.lease_s=inf: input should be a finite number"]),
        ("ingress.max_queued_requests=2147483648", ["=2147483648: input should be less than or equal to 2147483647"]),
        ("prefill.autoscaling_config.max_replicas=2", ["autoscaling_config.max_replicas: set `max_replicas` beside"]),
        ("decode.node_labels.pool=a@b", ["decode: node_labels: Invalid label selector value `a@b`"]),
        (
            "ingress.api_keys=keys.toml",
            ["ingress.api_keys=keys.toml: must be the absolute path of a file, or env:NAME"],
        ),
        (
            "ingress.cors_origins=https://a.b/",
            ["ingress.cors_origins.0=https://a.b/: 'https://a.b/' must be an origin"],
        ),
        ("ingress.cors_origins=", ["ingress.cors_origins.0=: '' must be an origin"]),
        ("mode.x=1", ["mode", "'disaggregated' or 'colocated'"]),
    ],
)
def test_a_wrong_argument_is_refused_by_name_with_what_is_allowed(pair, parts):
    message = refusal(pair)
    assert [part for part in parts if part not in message] == []
    assert "pydantic.dev" not in message


def test_all_wrong_arguments_are_named_at_once():
    assert refusal("mode=fast", "zzz=1").startswith("2 arguments are wrong")


@pytest.mark.parametrize("pair", ["prefill.max_replicas=2", "min_remote_prefill_tokens=1"])
def test_colocated_refuses_arguments_that_could_have_no_effect(pair):
    assert f"leave out {pair.split('.')[0].split('=')[0]}" in refusal("mode=colocated", pair)


def test_weights_of_a_choice_that_is_left_to_serve_are_refused():
    assert "leave out routing.key_tie and routing.prefill" in refusal(
        "routing.by_prefix=false", "routing.prefill.queue=3", "routing.key_tie=1"
    )


def test_pools_that_could_not_hand_over_kv_are_refused():
    assert "set engine.block_size" in refusal("prefill.engine.block_size=16")
    assert "set engine.dtype" in refusal("decode.engine.dtype=float16")
    assert "prefill.engine.quantization=fp8 and decode.engine.quantization=None" in refusal(
        "prefill.engine.quantization=fp8"
    )
    assert "set engine.kv_dtype" in refusal("engine.kv_dtype=fp8", "decode.engine.kv_dtype=auto")
    assert read("mode=colocated", "decode.engine.block_size=16").engine_config("decode").block_size == 16


def test_a_pools_engine_settings_win_over_the_shared_ones_and_these_over_the_defaults():
    config = read("engine.max_num_seqs=8", "engine.max_model_len=100", "decode.engine.max_num_seqs=9")
    assert config.engine_config("decode") == EngineConfig(
        max_num_seqs=9, max_model_len=100, num_threads=1, hands_over=False
    )
    assert config.engine_config("prefill") == EngineConfig(max_num_seqs=8, max_model_len=100, num_threads=1)


def test_an_engine_has_as_many_threads_as_cpus_reserved_unless_told_otherwise():
    config = read("decode.num_cpus=4", "prefill.num_cpus=4", "prefill.engine.num_threads=2")
    assert config.engine_config("decode").num_threads == 4
    assert config.engine_config("prefill").num_threads == 2


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/models/qwen", "qwen"),
        ("./files/tiny.Q4_1.gguf", "tiny.Q4_1"),
    ],
)
def test_the_served_name_comes_from_the_model_unless_given(model, name):
    assert read(f"model={model}").served_model_name == name
    assert read(f"model={model}", "served_model_name=other").served_model_name == "other"


def test_serve_takes_the_options_of_every_deployment():
    config = read(
        "prefill.num_gpus=1",
        "prefill.resources.slot=1",
        "prefill.node_labels.pool=prefill",
        "prefill.max_replicas=3",
        "prefill.initial_replicas=2",
        "prefill.autoscaling_config.upscale_delay_s=1.5",
        "ingress.node_labels.pool=cpu",
    )
    options = config.deployment_options("prefill")
    assert options["placement_group_bundles"] == [{"CPU": 0.1}, {"CPU": 0.8, "GPU": 1, "slot": 1}]
    assert options["placement_group_bundle_label_selector"] == [{"pool": "prefill"}] * 2
    deployment = serve.deployment()(Nothing).options(**options)
    scaling = deployment._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (1, 2, 3)
    assert scaling.upscale_delay_s == 1.5
    ingress = serve.deployment()(Nothing).options(**config.deployment_options("ingress"))
    assert ingress.ray_actor_options == {"num_cpus": 0.1, "label_selector": {"pool": "cpu"}}
    assert ingress.max_ongoing_requests == config.ingress.max_ongoing_requests


def test_a_health_check_outlasts_the_silence_that_it_finds():
    config = AppConfig.model_validate({"decode.engine.max_silence_s": 120})
    checks_s = {name: config.deployment_options(name)["health_check_timeout_s"] for name in ("prefill", "decode")}
    assert checks_s["prefill"] > config.engine_config("prefill").max_silence_s
    assert checks_s["decode"] > 120


def test_beyond_its_limits_serve_refuses_with_429():
    deployment = serve.deployment()(Nothing).options(**read().deployment_options("ingress"))
    assert deployment.max_queued_requests == 1024
    assert deployment.backpressure_config.status_code == 429


def test_bounds_of_admission_are_those_of_the_ingress_and_the_mode():
    bounds = read("ingress.max_ttft_s=2.5", "ingress.max_queued_tokens=5000", "min_remote_prefill_tokens=64")
    assert bounds.admission_bounds() == Bounds(max_ttft_s=2.5, max_queued_tokens=5000, min_remote_tokens=64)
    assert read("mode=colocated").admission_bounds().min_remote_tokens is None


@pytest.mark.parametrize(
    "pair", ["ingress.max_ttft_s=0", "ingress.max_queued_tokens=0", "decode.max_queued_requests=0"]
)
def test_a_bound_that_lets_nobody_in_is_refused(pair: str):
    assert pair in refusal(pair)


def test_serve_run_hands_a_builder_the_config_and_its_refusal():
    seen: list[AppConfig] = []

    def graph(args: AppConfig) -> serve.Application:
        seen.append(args)
        return serve.deployment()(Nothing).bind()

    assert isinstance(graph, FunctionType)
    call_user_app_builder_with_args_if_necessary(graph, {"decode.max_replicas": "2"})
    assert seen[0].decode.max_replicas == 2
    with pytest.raises(ConfigError, match=r"did you mean decode\.max_replicas"):
        call_user_app_builder_with_args_if_necessary(graph, {"decode.max_replica": "2"})


def test_a_pool_adds_to_the_guesses_of_all_engines():
    config = read("engine.speculation.method=ngram", "decode.engine.speculation.max_drafts=4")
    assert config.engine_config("decode").speculation == SpeculationConfig(method="ngram", max_drafts=4)
    assert "max_drafts=65" in refusal("engine.speculation.max_drafts=65")


def test_prefill_engines_guess_nothing_and_are_not_asked_to():
    config = read(*GUESSING)
    assert config.engine_config("prefill").speculation == SpeculationConfig()
    assert config.engine_config("decode").speculation == SpeculationConfig(method="draft_model", model="/small")
    assert "one token of each prompt" in refusal("prefill.engine.speculation.method=ngram")


def test_a_model_that_guesses_goes_with_its_method_alone():
    assert "needs model" in refusal("engine.speculation.method=draft_model")
    assert "needs model: an EAGLE-3 head" in refusal("engine.speculation.method=eagle3")
    assert "method=draft_model and method=eagle3 alone" in refusal("engine.speculation.model=/small")
    for method in ("off", "ngram"):
        config = read(*GUESSING, f"decode.engine.speculation.method={method}")
        assert config.engine_config("decode").speculation == SpeculationConfig(method=method)


def test_settings_of_guesses_are_judged_once_they_are_together():
    config = read(*GUESSING, "decode.engine.speculation.model=/other")
    assert config.engine_config("decode").speculation == SpeculationConfig(method="draft_model", model="/other")
    config = read("engine.speculation.model=/small", "decode.engine.speculation.method=draft_model")
    assert config.engine_config("decode").speculation == SpeculationConfig(method="draft_model", model="/small")
    assert refusal("decode.engine.speculation.method=draft_model").startswith("decode.engine.speculation: method is")
    lonely = "decode.engine.speculation.method=ngram", "decode.engine.speculation.model=/small"
    assert "model is '/small', which takes effect with" in refusal(*lonely)
    split = "engine.speculation.method=ngram", "decode.engine.speculation.model=/small"
    assert refusal(*split).startswith("engine.speculation and decode.engine.speculation: model is '/small'")
    assert "max_drafts=0" in refusal(*GUESSING, "decode.engine.speculation.max_drafts=0")


def test_every_argument_is_listed_with_a_meaning():
    arguments = list(arguments_of(AppConfig))
    assert all(argument.meaning for argument in arguments)
    told = {name.removeprefix("engine.").partition(".")[0] for name in (a.name for a in arguments) if "engine." in name}
    assert EngineConfig.model_fields.keys() - told == {"model"}
    listing = list_arguments(AppConfig)
    assert "prefill.max_replicas" in listing
    assert "decode.*" in listing
