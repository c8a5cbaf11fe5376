"""`predict.py` predicts as `selfkd.load` does, by onnxruntime and numpy alone."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import selfkd
from selfkd.deployment.export import export_onnx
from selfkd.deployment.interface import Interface
from selfkd.deployment.predictor import write_predictor
from selfkd.models import make_model
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.tasks.text.models import make_language_model
from selfkd.tasks.text.tokenizer import make_tokenizer, vocabulary_of

SIZE = 8
NAMES = [
    'a"b',
    "c'd",
    "e\nf",
    "{g}%s",
    "$h $$",
    "\\",
    "naïve 猫",
    "\x1b[31m\x00\u202e",
    '"""\nraise 1',
]
ALONE = """
import sys, runpy
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {allowed}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
assert not {{"torch", "selfkd", "PIL", "transformers"}} & sys.modules.keys()
"""


def load_module(folder):
    spec = importlib.util.spec_from_file_location("predict", folder / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_alone(folder, *arguments, also=()):
    """Run `predict.py` where nothing but onnxruntime, numpy and `also` can be imported."""
    allowed = {*sys.stdlib_module_names, "numpy", "onnxruntime", *also}
    argv = [str(folder / "predict.py"), *map(str, arguments)]
    code = ALONE.format(allowed=allowed, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def deployed(request, tmp_path_factory):
    """Return a classifier of `selfkd.load`, and its predict.py as a module."""
    channels, folder = request.param, tmp_path_factory.mktemp("deploy")
    torch.manual_seed(0)
    args = {"width": 16}
    network = make_model(
        "selfkd_mlp", args, num_classes=len(NAMES), in_chans=channels, image_size=SIZE
    )
    inputs = torch.zeros(2, channels, SIZE, SIZE)
    export_onnx(network, inputs, Interface(input="images"), folder / "int8.onnx")
    facts = {
        "model": {"name": "selfkd_mlp", "args": args},
        "classes": NAMES,
        "image_size": SIZE,
        "mean": [0.4914, 0.4822, 0.4465][:channels],
        "std": [0.247, 0.243, 0.261][:channels],
    }
    checkpoint = folder / "model.safetensors"
    save_tensors(checkpoint, network.state_dict(), facts)
    metadata = load_tensors(checkpoint)[1]
    found = write_predictor(folder, metadata, Interface(input="images"), task="images")
    assert found == {"predict.py": f"{folder.name}/predict.py"}
    return selfkd.load(checkpoint), load_module(folder)


def picture(mode, size=(13, 10)):
    """Return a picture of random pixels."""
    draws = np.random.default_rng(0)
    width, height = size
    if mode == "I;16":
        return Image.fromarray(draws.integers(0, 2**16, (height, width), dtype=np.uint16))
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "1": 1, "P": 3}[mode]
    pixels = draws.integers(0, 256, (height, width, channels), dtype=np.uint8)
    if mode in ("1", "P"):
        return Image.fromarray(pixels[..., 0] if mode == "1" else pixels).convert(mode)
    return Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode=mode)


def check_same(deployed, images):
    model, module = deployed
    labels, probabilities = module.predict(images)
    expected = model.predict(images)
    assert labels == expected.names
    np.testing.assert_allclose(probabilities, expected.probabilities, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK", "I;16"])
def test_predicts_pictures_as_evaluation_does(deployed, mode, tmp_path):
    file = str(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    picture(mode).save(file)
    check_same(deployed, [file])
    # what it is given is that of evaluation bit for bit
    model, module = deployed
    inputs = next(model._predictor.inputs(file, batch_size=1, device="cpu"))
    pixels = module.read(file).astype(np.float32)
    scale, shift = 1 / (255 * np.array(module.STD)), -np.array(module.MEAN) / module.STD
    made = pixels * scale.astype(np.float32) + shift.astype(np.float32)
    np.testing.assert_array_equal(made.transpose(2, 0, 1)[None], inputs)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turns_photographs_upright(deployed, orientation, tmp_path):
    photograph, exif = picture("RGB", (9, 12)), Image.Exif()
    exif[0x0112] = orientation
    photograph.save(tmp_path / "a.png", exif=exif)
    check_same(deployed, [str(tmp_path / "a.png")])


@pytest.mark.parametrize("size", [(8, 8), (8, 9), (16, 16), (5, 7), (40, 23), (1, 3), (300, 201)])
def test_scales_pictures_of_any_size(deployed, size, tmp_path):
    picture("RGB", size).save(tmp_path / "a.png")
    check_same(deployed, [str(tmp_path / "a.png")])


def test_predicts_arrays_and_files_of_them(deployed, tmp_path):
    channels = len(deployed[1].MEAN)
    draws = np.random.default_rng(1)
    images = list(draws.integers(0, 256, (5, SIZE, SIZE, channels), dtype=np.uint8))
    check_same(deployed, images)
    check_same(deployed, [image.squeeze() for image in images])
    np.save(tmp_path / "a.npy", images[0])
    labels, probabilities = deployed[1].predict([str(tmp_path / "a.npy")])
    assert labels == deployed[0].predict(images[:1]).names
    assert probabilities.shape == (1, len(NAMES))
    # those of another size are scaled by Pillow, here by torch: a level apart at most
    large = draws.integers(0, 256, (21, 17, channels), dtype=np.uint8)
    difference = deployed[1].predict([large])[1] - deployed[0].predict(large).probabilities.numpy()
    assert abs(difference).max() < 0.01


def test_predicts_what_a_service_is_sent(deployed, tmp_path):
    picture("RGB").save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as stream:
        labels, _ = deployed[1].predict([stream])
    assert labels == deployed[0].predict(str(tmp_path / "a.png")).names


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((SIZE, SIZE), dtype=np.float32), "arrays must be uint8, got float32"),
        (Image.new("F", (SIZE, SIZE)), "pictures must have 8 or 16 bits a channel, got .*: F"),
    ],
)
def test_refuses_pixels_without_a_known_range(deployed, image, message, tmp_path):
    if not isinstance(image, np.ndarray):
        image.save(tmp_path / "a.tif")
        image = str(tmp_path / "a.tif")
    with pytest.raises((TypeError, ValueError), match=message):
        deployed[1].predict([image])


def test_names_of_classes_are_literals(deployed):
    source = Path(deployed[1].__file__).read_text(encoding="utf-8")
    assert deployed[1].CLASSES == NAMES
    assert "\x1b" not in source
    assert "\u202e" not in source
    assigned = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    assert NAMES in [ast.literal_eval(value) for value in assigned]


def test_needs_onnxruntime_and_numpy_alone(deployed):
    module = deployed[1]
    folder = Path(module.__file__).parent
    image = np.full((SIZE, SIZE, len(module.MEAN)), 77, dtype=np.uint8)
    np.save(folder / "a.npy", image)
    (folder / "float.onnx").write_bytes((folder / "int8.onnx").read_bytes())
    (label,), (row,) = module.predict([image])
    printed = run_alone(folder, "--file", "float.onnx", folder / "a.npy")
    assert printed == f"{folder / 'a.npy'}: {label} ({row.max():.1%})\n"


def test_metadata_without_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metadata must have 'classes' for predict\.py, got none"):
        write_predictor(tmp_path, {"hash": "0"}, Interface(input="images"), task="images")


# --- text ---

CONTEXT = 12
TOKENS = Interface(input="tokens", axes={0: "batch", 1: "length"}, longest={"length": CONTEXT})


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """Return a language model of `selfkd.load`, and its predict.py as a module."""
    folder = tmp_path_factory.mktemp("deploy")
    tokenizer, end = make_tokenizer("chars", ["the quick brown fox, naïve “x”"])
    size = vocabulary_of(tokenizer)
    torch.manual_seed(0)
    args = {"depth": 1, "width": 8, "heads": 2}
    network = make_language_model("selfkd_gpt", args, vocabulary=size, context=CONTEXT)
    export_onnx(network, torch.zeros((2, 3), dtype=torch.int64), TOKENS, folder / "float.onnx")
    facts = {
        "task": "text",
        "model": {"name": "selfkd_gpt", "args": args},
        "vocabulary": size,
        "context": CONTEXT,
        "end": end,
        "tokenizer": tokenizer.to_str(),
    }
    save_tensors(folder / "model.safetensors", network.state_dict(), facts)
    metadata = load_tensors(folder / "model.safetensors")[1]
    found = write_predictor(folder, metadata, TOKENS, task="text", file="float.onnx")
    assert found == {name: f"{folder.name}/{name}" for name in ("predict.py", "tokenizer.json")}
    return selfkd.load(folder / "model.safetensors"), load_module(folder)


@pytest.mark.parametrize("prompt", ["", "the", "naïve", "fox, “", "quick brown"])
@pytest.mark.parametrize("most", [None, 1, 4])
def test_writes_the_greedy_text_of_the_model(writer, prompt, most):
    model, module = writer
    expected = model.generate(prompt, greedy=True, most=most)
    assert module.generate(prompt, greedy=True, most=most) == expected
    assert module.generate(prompt, top_p=1e-9, most=most, seed=3) == expected
    assert module.generate(prompt, temperature=1e-9, most=most) == expected


def test_samples_by_a_seed(writer):
    generate = writer[1].generate
    assert generate("the", seed=1) == generate("the", seed=1)
    assert len({generate("the", seed=seed) for seed in range(8)}) > 1
    assert len(generate("", most=3, seed=1)) <= 3


@pytest.mark.parametrize("top_p", [0.3, 0.75, 1.0])
def test_samples_from_the_smallest_set_of_that_probability(writer, top_p):
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], dtype=np.float32))
    draws = np.random.default_rng(0)
    found = [writer[1].sample(logits, 1.0, top_p, draws) for _ in range(500)]
    shares = np.bincount(found, minlength=4) / 500
    kept = {0.3: [1], 0.75: [1, 3], 1.0: [0, 1, 2, 3]}[top_p]
    expected = np.where(np.isin(np.arange(4), kept), [0.1, 0.5, 0.15, 0.25], 0)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.06)


def test_refuses_a_prompt_that_leaves_no_room(writer):
    with pytest.raises(ValueError, match=f"at most {CONTEXT - 1} tokens, got {CONTEXT}"):
        writer[1].generate("x" * CONTEXT)


def test_needs_onnxruntime_numpy_and_tokenizers_alone(writer):
    model, module = writer
    folder = Path(module.__file__).parent
    printed = run_alone(folder, "the", "--greedy", also=["tokenizers"])
    assert printed == f"the{model.generate('the', greedy=True)}\n"
