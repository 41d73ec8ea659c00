"""The first sequences by themselves: in the report, in its files, and in the page."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from hf_lnfree.analysis import AttentionEntropyAnalyzer, EntropyReport, published_reports
from hf_lnfree.errors import RunError, SettingsError
from hf_lnfree.files import file_hash, read_json, write_json
from hf_lnfree.pages.entropy import text_by_text, write_entropy_page

from ..conftest import GPT2
from ..pages.pages import read

LENGTHS = (12, 5, 0, 9)


@pytest.fixture
def batch():
    ids = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.stack([(torch.arange(12) < length).long() for length in LENGTHS])
    return {"input_ids": ids, "attention_mask": mask}


def report_of(model, *batches):
    return AttentionEntropyAnalyzer(model).run(batches, name="model")


def test_they_are_what_each_sequence_gives_alone(batch):
    model = GPT2.model().double()
    found = report_of(model, batch)
    assert found.sequence_entropy.shape == found.sequence_bound.shape == (4, 3, 4)
    for index, length in enumerate(LENGTHS):
        if not length:
            assert found.sequence_entropy[index].isnan().all()  # nothing but padding
            assert not found.of_sequence(index).heads.any()
            continue
        alone = report_of(model, {"input_ids": batch["input_ids"][[index], :length]})
        torch.testing.assert_close(found.sequence_entropy[index], alone.entropy, rtol=0, atol=1e-12)
        bound = sum(math.log(keys) for keys in range(1, length + 1)) / length
        torch.testing.assert_close(found.of_sequence(index).bound, torch.full((3, 4), bound, dtype=torch.float64))


def test_six_of_them_in_their_order_however_they_are_batched():
    model = GPT2.model().double()
    ids = torch.randint(3, 99, (30, 8), generator=torch.Generator().manual_seed(0))
    one, many = report_of(model, ids), report_of(model, *ids.split(7))
    assert len(one.sequence_entropy) == len(many.sequence_entropy) == 6
    torch.testing.assert_close(one.sequence_entropy, many.sequence_entropy, rtol=0, atol=1e-12)
    with pytest.raises(SettingsError, match="Sequence 6: the report has 6"):
        one.of_sequence(6)


def test_they_are_saved_and_older_files_have_none(batch, tmp_path):
    report = report_of(GPT2.model(), batch)
    report.save(tmp_path / "entropy")
    loaded = EntropyReport.load(tmp_path / "entropy")
    torch.testing.assert_close(loaded.sequence_entropy, report.sequence_entropy, equal_nan=True)
    beside = tmp_path / "entropy.safetensors"
    tensors = {name: value for name, value in load_file(beside).items() if not name.startswith("sequence_")}
    save_file(tensors, beside)
    shown = read_json(tmp_path / "entropy.json") | {"safetensors_sha256": file_hash(beside)}
    write_json(tmp_path / "entropy.json", shown)
    assert len(EntropyReport.load(tmp_path / "entropy").sequence_entropy) == 0
    tensors.pop("histogram")
    save_file(tensors, beside)
    write_json(tmp_path / "entropy.json", shown | {"safetensors_sha256": file_hash(beside)})
    with pytest.raises(RunError, match="histogram"):
        EntropyReport.load(tmp_path / "entropy")


def test_a_reader_of_the_page_chooses_a_text(batch, tmp_path):
    reports = [report_of(GPT2.model(seed=seed), batch) for seed in (0, 1)]
    for report in reports:
        report.metadata["first_texts"] = ["first <b>text</b>", "second", "padding", "x" * 500]
    write_entropy_page(tmp_path, reports)
    page = read(tmp_path / "report.html")
    assert [option.text for option in page.all("option")] == ["0", "1", "3"]
    shown = [listing.text for listing in page.all("pre")]
    assert "first <b>text</b>" in shown
    assert f"{'x' * 399}…" in shown
    other = report_of(GPT2.model(), {"input_ids": batch["input_ids"] + 1 - 1})  # without the mask: other data
    (section,) = text_by_text([reports[0], other], "causal")
    assert "model" in section.blocks[1].options["0"][-1].alt


def test_there_is_nothing_to_choose_from_a_single_text_or_published_figures(batch):
    single = report_of(GPT2.model(), {key: value[:1] for key, value in batch.items()})
    assert text_by_text([single], "causal") == []
    assert text_by_text([*published_reports().values()][:2], "causal") == []


def test_a_class_token_has_a_line_of_its_own():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=4, num_labels=3
    )
    torch.manual_seed(0)
    model = ViTForImageClassification(config).double().eval()
    for block in model.vit.layers:
        block.attention.q_proj.weight.data *= 40
    pixels = torch.randn(12, 3, 24, 24, dtype=torch.float64)
    report = AttentionEntropyAnalyzer(model).run([{"pixel_values": pixels[:5]}, {"pixel_values": pixels[5:]}])
    alone, others = report.first_token
    # B H Q, of eager attention, which takes its softmax in float32.
    for layer, of_layer in enumerate(record_of(model, pixels)):
        torch.testing.assert_close(alone[layer], of_layer[:, :, 0].mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(others[layer], of_layer[:, :, 1:].mean((0, 2)), rtol=1e-6, atol=0)
    assert report.metadata["class_token"]
    assert f"class token {float(alone.mean()):.2f} nats, other queries {float(others.mean()):.2f} nats" in str(report)
    assert report.by_layer().rows[1][-1] == f"{float(alone[1].mean()):.2f}"


def record_of(model, pixels):
    model.set_attn_implementation("eager")
    maps = model(pixels, output_attentions=True).attentions
    return [-(p * p.log()).sum(-1) for p in maps]
