"""Configurations that cannot be run: each is refused in one line that names the field."""

import math
from typing import get_args

import pytest

from tasks.config import RunConfig, load_config
from tasks.toml import parse_value, sections_of, toml_value
from tests.flows.bad_input import assert_refused


def fields(number):
    """'section.field' of every field that holds such a number, also in a list or as an alternative to none."""

    def holds(annotation):
        return annotation is number or any(holds(part) for part in get_args(annotation))

    for name, section in sections_of(RunConfig).items():
        for field, about in section.model_fields.items():
            if holds(about.annotation):
                yield f"{name}.{field}", "[" if isinstance(about.default, tuple) else ""


NO_INTEGERS = ("true", "1.5", "'7'", "1979-05-27", str(-(10**30)), str(10**30), "inf", "{}")
NO_FLOATS = ("inf", "-inf", "nan", "true", "'0.1'", "-1", "1e300", "{}")
NUMBERS = [
    (path, f"[{value}]" if listed else value)
    for number, values in ((int, NO_INTEGERS), (float, NO_FLOATS))
    for path, listed in fields(number)
    for value in values
]

VALUES = [
    ("name=", ["name", "empty"]),
    ("name='  '", ["name", "empty"]),
    ("name=5", ["name", "string"]),
    (r'name="a\nb"', ["name", "one line"]),
    (r'name="\u0000"', ["name", "one line"]),
    (f"name={'x' * 300}", ["name", "200"]),
    ("name=['a']", ["name", "string"]),
    ("store=", ["store", "empty"]),
    (r'store="a\u0000b"', ["store", "one line"]),
    (f"store={'x' * 5000}", ["store", "4,096"]),
    ("data=", ["data", "empty"]),
    ("data=true", ["data", "string"]),
    ("model.path=", ["model.path", "empty"]),
    ("model.path=[]", ["model.path", "string"]),
    ("model.revision=", ["model.revision", "empty"]),
    ("model.dtype=int8", ["model.dtype", "float32"]),
    ("model.dtype=FLOAT32", ["model.dtype", "float32"]),
    ("prune.rato=0.5", ["unknown config key 'prune.rato'", "ratio"]),
    ("Prune.ratio=0.5", ["unknown config key 'Prune'"]),
    ("colour=1", ["unknown config key 'colour'", "prune"]),
    ("sweep.prune.ratio=[0.1]", ["unknown config key 'sweep'"]),
    ("model.path.x=1", ["model.path"]),
    ("name.x=1", ["name"]),
    ("prune.ratio=0", ["prune.ratio", "greater than 0"]),
    ("prune.ratio=1", ["prune.ratio", "less than 1"]),
    ("prune.ratio=", ["prune.ratio", "number"]),
    ("prune.ratio=0,5", ["prune.ratio", "number"]),
    ("prune.ratio=20%", ["prune.ratio", "number"]),
    ("prune.ratio=[0.2,0.5]", ["prune.ratio", "number"]),
    ("prune={ratio=3}", ["prune.ratio", "less than 1"]),
    ("prune={rato=0.3}", ["unknown config key 'prune.rato'"]),
    ("prune=[0.3]", ["prune is a section", "prune.ratio"]),
    ("recover=none", ["recover is a section", "recover.recipe"]),
    ("prune.search=greedy", ["prune.search", "uniform"]),
    ("prune.direction=lowst", ["prune.direction", "lowest"]),
    ("prune.kinds=heads", ["prune.kinds", "mlp"]),
    ("prune.compensation=yes", ["prune.compensation", "bias"]),
    ("prune.protect=0", ["prune.protect"]),
    ("prune.protect=[1,1]", ["prune.protect", "twice"]),
    ("prune.protect=['0']", ["prune.protect", "integer"]),
    ("prune.align=0", ["prune.align", "1"]),
    ("prune.ridge=0", ["config prune.ridge: input should be greater than 0 or 'held_out', got 0"]),
    ("prune.ridge=best", ["config prune.ridge: input should be a valid number or 'held_out', got 'best'"]),
    ("calibrate.own=-1", ["config calibrate.own: input should be greater than or equal to 0 or 'auto', got -1"]),
    ("calibrate.own=true", ["config calibrate.own: input should be a valid integer or 'auto', got True"]),
    ("fluctuation.fluctuation=std", ["config fluctuation.fluctuation: input should be 'var_weight'", "'std'"]),
    ("prune.protect=[0,'a']", ["config prune.protect.1: input should be a valid integer, got 'a'"]),
    ("criterion.take_heads=none", ["criterion.take_heads", "measured"]),
    ("criterion.name=sapp", ["criterion.name", "saap_plus"]),
    ("criterion.cuts=[0.1,0.1]", ["criterion.cuts", "twice"]),
    ("criterion.cuts=[0.1,1]", ["criterion.cuts", "less than 1"]),
    ("criterion.cuts=0.1", ["criterion.cuts"]),
    ("calibrate.count=0", ["calibrate.count", "1"]),
    ("calibrate.length=1", ["calibrate.length", "2"]),
    ("calibrate.seed=-1", ["calibrate.seed", "0"]),
    ("calibrate.seed=4294967296", ["calibrate.seed", "4294967296"]),
    ("recover.recipe=lorra", ["recover.recipe", "qlora"]),
    ("recover.bits=1", ["recover.bits", "2"]),
    ("recover.bits=9", ["recover.bits", "8"]),
    ("recover.group_size=1", ["recover.group_size", "2"]),
    ("recover.groups=0", ["recover.groups", "1"]),
    ("recover.targets=['q_proj','q_proj']", ["recover.targets", "twice"]),
    ("recover.targets=q_proj", ["recover.targets"]),
    ("recover.targets=['']", ["recover.targets", "empty"]),
    ("recover.epochs=0", ["recover.epochs", "greater than 0"]),
    ("recover.learning_rate=0", ["recover.learning_rate", "greater than 0"]),
    ("recover.precision=fp16", ["recover.precision", "float16"]),
    ("recover.schedule=step", ["recover.schedule", "cosine"]),
    ("recover.loss_on=answers", ["recover.loss_on", "response"]),
    ("recover.held_out=1", ["recover.held_out", "less than 1"]),
    ("recover.distill=1.1", ["recover.distill", "less than or equal to 1"]),
    ("recover.gradient_checkpointing=1", ["recover.gradient_checkpointing", "boolean"]),
    ("recover.gradient_checkpointing=yes", ["recover.gradient_checkpointing", "boolean"]),
    ("evaluate.benchmarks=['mmlu']", ["evaluate.benchmarks", "mmlu"]),
    ("evaluate.benchmarks=arc_easy", ["evaluate.benchmarks"]),
    ("evaluate.benchmarks=['piqa','piqa']", ["evaluate.benchmarks", "twice"]),
    ("evaluate.variants=['sparse']", ["evaluate.variants", "pruned"]),
    ("evaluate.variants=['dense','dense']", ["evaluate.variants", "twice"]),
    ("evaluate.windows=[128,128]", ["evaluate.windows", "twice"]),
    ("evaluate.windows=[1]", ["evaluate.windows", "2"]),
    ("evaluate.windows=128", ["evaluate.windows"]),
    ("evaluate.limit=0", ["evaluate.limit", "1"]),
    ("evaluate.samples=2", ["evaluate.samples", "boolean"]),
    ("speed.new_tokens=1", ["speed.new_tokens", "2"]),
    ("speed.llama_cpp='true'", ["speed.llama_cpp", "boolean"]),
    ("compute.device=gpu", ["compute.device", "cuda"]),
    ("compute.device=cuda:", ["compute.device", "cuda"]),
    ("compute.device=cuda:-1", ["compute.device", "cuda"]),
    ("compute.device=", ["compute.device", "cuda"]),
    ("compute.threads=0", ["compute.threads", "1"]),
    ("compute.threads=100000", ["compute.threads", "1024"]),
    ("compute.launch=--multi_gpu 'x", ["compute.launch", "arguments"]),
    ("compute.launch=", ["compute.launch", "empty"]),
    ("prune", ["section.field=value", "prune"]),
    ("", ["section.field=value"]),
    ("=1", ["section.field"]),
    ("prune.=1", ["section.field"]),
    (".ratio=1", ["section.field"]),
    ("prune..ratio=1", ["section.field"]),
    (f"prune.ratio={'[' * 3000}", ["prune.ratio", "number"]),
    (f"prune.ratio={'9' * 5000}", ["prune.ratio", "number"]),
    ("prune.ratio=0.5\nname=1", ["prune.ratio", "number"]),
    ("name=\udcff", ["name"]),
]

TOGETHER = [
    (["recover.batch_size=6"], ["recover.batch_size", "recover.micro_batch_size"]),
    (["recover.micro_batch_size=5"], ["recover.batch_size", "multiple"]),
    (["recover.examples=4"], ["recover.examples = 4", "recover.micro_batch_size"]),
    (["recover.examples=10", "recover.held_out=0.5"], ["recover.examples = 10", "recover.micro_batch_size"]),
    (["recover.prose=0.01", "recover.examples=40"], ["recover.prose = 0.01", "recover.examples = 40", "less than one"]),
    (["recover.own=0.5", "recover.prose=0.5"], ["recover.own", "recover.examples"]),
    (["recover.own=0.8"], ["recover.own", "recover.prose", "at most 1"]),
    (["recover.own=0.5", "recover.prose=0.6", "recover.examples=99"], ["recover.own", "recover.prose", "at most 1"]),
    (["recover.patience=2", "recover.held_out=0"], ["recover.patience", "recover.held_out"]),
    (
        ["recover.examples=131", "recover.prose=0", "recover.own=0"],
        ["131 instruction rows, the data has 130", "lower it"],
    ),
    (["recover.examples=200", "recover.prose=0.3", "recover.own=0"], ["140 instruction rows beside 60 other", "130"]),
    (["recover.patience=2", "recover.examples=20"], ["recover.patience", "recover.held_out"]),
    (["criterion.name=saap_plus", "prune.kinds=mlp"], ["saap_plus", "prune.kinds", "criterion.cuts = []"]),
    (["criterion.name=saap_plus", "prune.search=uniform"], ["saap_plus", "prune.search", "criterion.cuts = []"]),
    (
        ["criterion.name=saap_plus", "criterion.cuts=[]", "criterion.take_heads=measured", "prune.kinds=mlp"],
        ["saap_plus", "prune.kinds", "criterion.take_heads = 'pooled'"],
    ),
    (["criterion.name=saap_plus", "calibrate.own=0", "calibrate.count=5"], ["take_heads", "needs 6", "not 5"]),
    (["prune.compensation=least_squares", "calibrate.count=1"], ["prune.ridge = 'held_out' needs 2", "not 1"]),
    (["calibrate.count=1"], ["'saap' needs 2 calibration sequences", "calibrate.count"]),
    (["criterion.name=saap_plus", "prune.direction=highest"], ["saap_plus", "prune.direction"]),
    (["criterion.name=gisp", "prune.search=uniform"], ["gisp", "prune.search = 'global'"]),
    (["criterion.name=saap_gates", "prune.direction=highest"], ["saap_gates", "prune.direction"]),
    (["criterion.name=wanda_sp", "prune.search=global"], ["wanda_sp", "prune.search = 'uniform_down'"]),
    (["recover.recipe=qlora", "compute.launch=--use_fsdp"], ["NF4", "--multi_gpu"]),
    (["compute.launch=--multi_gpu", "compute.device=cuda:1"], ["compute.launch", "compute.device = 'cuda'"]),
]

FILES = [
    ("name = ", ["not valid TOML", "end of document"]),
    ("name = 'a'\nname = 'b'", ["not valid TOML"]),
    ("[prune]\nratio = 0.2\n[prune]\n", ["not valid TOML"]),
    ("{}", ["not valid TOML"]),
    ('{"name": "x"}', ["not valid TOML"]),
    ("name: x", ["not valid TOML"]),
    ("name = 'größe'".encode("latin-1"), ["UTF-8"]),
    ("name = 'x'".encode("utf-16"), ["UTF-8"]),
    ("name = 'x'".encode("utf-16-le"), ["not valid TOML"]),
    (b"\x7fELF\x02\x01\x01" + bytes(range(256)), ["not valid TOML"]),
    (b"\0" * 100, ["not valid TOML"]),
    (b"\x89PNG\r\n\x1a\n", ["UTF-8"]),
    ("[prune]\nratio = " + "[" * 3000, ["nested too deep"]),
    ("[prune]\nratio = " + "[" * 100 + "]" * 100, ["prune.ratio"]),
    ("calibrate.count = " + "9" * 5000, ["not valid TOML"]),
    ("#" * (1 << 21), ["larger than"]),
    ("prune = 0.5", ["prune"]),
    ("[[prune]]\nratio = 0.5", ["prune"]),
    ("[prunes]\nratio = 0.5", ["unknown config key 'prunes'"]),
    ("[prune.ratio]\nx = 1", ["prune.ratio"]),
    ("sweep = 3", ["[sweep]", "lists"]),
    ("name = ''\n[sweep]\n'prune.ratio' = [0.2]", ["name", "empty"]),
    ("name = 2026-11-27\nstore = ''", ["store", "empty"]),
    ("a.b.c.d = 1", ["unknown config key 'a'"]),
    ("'' = 1", ["unknown config key ''"]),
    ("compute.device = 'tpu'", ["compute.device"]),
]


@pytest.fixture(autouse=True, scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "empty.toml"
    file.touch()
    return file


@pytest.mark.parametrize(("path", "value"), NUMBERS, ids=lambda part: part[:30])
def test_a_number_that_is_none_or_absurd_is_refused_for_every_field_there_is(file, path, value):
    assert_refused([f"config {path}", "got"], "plan", file, "--set", f"{path}={value}")


@pytest.mark.parametrize(("override", "words"), VALUES, ids=lambda part: ascii(part)[:40])
def test_a_value_that_cannot_be_is_refused(file, override, words):
    assert_refused(words, "plan", file, "--set", override)


@pytest.mark.parametrize(("overrides", "words"), TOGETHER, ids=str)
def test_values_that_do_not_go_together_are_refused(file, overrides, words):
    assert_refused(words, "plan", file, *(part for override in overrides for part in ("--set", override)))


@pytest.mark.parametrize(("content", "words"), FILES, ids=lambda part: ascii(part)[:40])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, words):
    file = tmp_path / "bad.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(words, "plan", file)


def test_a_path_that_is_no_file_is_refused(tmp_path):
    assert_refused(["no regular file"], "plan", tmp_path)
    assert_refused(["no regular file"], "plan", "/dev/zero")
    assert_refused(["No such file"], "plan", tmp_path / "none.toml")
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    assert_refused(["loop.toml"], "plan", tmp_path / "loop.toml")


def test_what_people_write_is_taken(tmp_path):
    file = tmp_path / "good.toml"
    file.write_bytes(b"\xef\xbb\xbfname = 'gr\xc3\xb6\xc3\x9fe'\r\n[prune]\r\nratio = 0.3\r\n")  # as Windows saves it
    settings = load_config(file, ("recover.epochs=3", "evaluate.windows=[64]", "data=/a b/#c", "prune={align=8}"))
    assert settings.prune.align == 8
    assert (settings.name, settings.prune.ratio, settings.recover.epochs) == ("größe", 0.3, 3.0)
    assert (settings.evaluate.windows, settings.data) == ((64,), "/a b/#c")


@pytest.mark.parametrize(
    "value", ['a"b', "a\\b", "a'b", "ü\U0001f600", "\x7f", "", "3", "true", 3, 2.5, 1e-30, True, ["a", 1], {"a b": [1]}]
)
def test_a_value_written_as_toml_reads_back(value):
    assert parse_value(toml_value(value)) == value
    assert type(parse_value(toml_value(value))) is type(value)
    assert math.isinf(parse_value("inf"))


def test_a_store_with_quotes_and_backslashes_is_taken_as_it_is(file, tmp_path):
    store = tmp_path / 'a"b\\c'
    line = "model path /no/such/model does not exist"
    assert_refused([line], "plan", file, "--store", store, "--set", "model.path=/no/such/model")
