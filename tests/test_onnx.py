"""An exported model through torch.export and in onnxruntime, with any number of rows and positions."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from gptbert.export import ExportConfig, export
from tests.exported import write_checkpoint

SHAPES = [(1, 5), (4, 40), (2, 1)]  # beyond max_position_embeddings too


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With one layer, since translating takes long, and weights that are neither 0 nor 1."""
    folder = tmp_path_factory.mktemp("onnx")
    export(ExportConfig(write_checkpoint(folder)[0], folder / "exported"))
    config = AutoConfig.from_pretrained(folder / "exported", trust_remote_code=True, num_hidden_layers=1)
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config, trust_remote_code=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def program(model):
    ids, mask = inputs(3, 11)  # two tensors: the same one twice would be one input to the translation
    free = {0: torch.export.Dim("rows"), 1: torch.export.Dim("length")}
    return torch.export.export(
        model,
        (),
        {"input_ids": ids, "attention_mask": mask, "return_dict": False},
        dynamic_shapes={"input_ids": free, "attention_mask": free, "return_dict": None},
    )


def inputs(rows, length):
    """Ids, and a mask with padding on both sides."""
    ids = torch.randint(16, 300, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    if length > 1:
        mask[0, -2:] = mask[-1, :1] = 0
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_a_program_takes_any_shape(model, program, shape):
    ids, mask = inputs(*shape)
    (logits,) = program.module()(input_ids=ids, attention_mask=mask, return_dict=False)
    torch.testing.assert_close(logits, model(ids, mask).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_onnxruntime_computes_the_same(model, program, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"]}
    torch.onnx.export(program, f=str(tmp_path / "model.onnx"), dynamo=True, verbose=False, **names)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        ids, mask = inputs(*shape)
        (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        np.testing.assert_allclose(logits, model(ids, mask).logits.numpy(), rtol=1e-5, atol=1e-5)
