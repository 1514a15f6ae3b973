"""Export of a merged model: to GGUF, with what its precision costs, and to the Hub."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from yrunner.assembly.measure import RowLosses, losses_of_rows
from yrunner.assembly.run import Run
from yrunner.commands.merge.verify import FIXED_TEXTS, figure_of, judge, probes_of, say_likeness
from yrunner.console import progress, say, warn
from yrunner.errors import ProofError
from yrunner.machine import free_memory
from yrunner.models.export.upload import check_upload, upload
from yrunner.models.gguf.needs import check_gguf
from yrunner.models.load import load_model
from yrunner.models.merge.proof import (
    LogitAgreement,
    Tolerance,
    compare,
    largest_weight_error,
    logits_at,
)
from yrunner.models.merge.safetensors_io import SafetensorsFolder, open_checkpoint
from yrunner.models.meta import read_config
from yrunner.models.save import ModelCard, render_card
from yrunner.storage.run_dir import whole_folder, write_json, write_text

GGUF_BARS = {
    "f32": Tolerance(top1_agreement=0.999, mean_kl=1e-6, largest_difference=1e-3),
    "f16": Tolerance(top1_agreement=0.99, mean_kl=1e-3),
    "bf16": Tolerance(top1_agreement=0.97, mean_kl=1e-2),
    "q8_0": Tolerance(top1_agreement=0.95, mean_kl=0.02),
    "q6_k": Tolerance(top1_agreement=0.9, mean_kl=0.05),
    **dict.fromkeys(("q5_k_m", "q5_1", "q5_0"), Tolerance(top1_agreement=0.7, mean_kl=0.4)),
    **dict.fromkeys(("q4_k_m", "q4_1", "q4_0"), Tolerance(top1_agreement=0.6, mean_kl=0.8)),
}
"""Tolerances of a GGUF file against the merged model: fewer bits, wider tolerance."""
WEIGHT_BARS = {
    "f32": 1e-4,
    "f16": 4e-3,
    "bf16": 4e-3,
    "q8_0": 0.02,
    "q6_k": 0.06,
    **dict.fromkeys(("q5_k_m", "q5_1", "q5_0"), 0.12),
    **dict.fromkeys(("q4_k_m", "q4_1", "q4_0"), 0.25),
}
"""How far a weight may be from the merged model's, over its own size: about three times the
rounding of normally distributed weights. Catches what the wide tolerances of few bits let pass."""
UNROUNDED = {torch.float16: "f16", torch.bfloat16: "bf16"}
"""The type of the file to quantize from, by the dtype of the merged weights; others are f32."""


@dataclass(frozen=True)
class GGUFProof:
    """A GGUF file, read back, beside the merged model."""

    likeness: LogitAgreement
    merged: RowLosses
    read_back: RowLosses

    @property
    def loss_in_words(self) -> str:
        """The loss of both; empty if the run has no rows with right answers."""
        if not self.merged.targets:
            return ""
        change = self.read_back.mean - self.merged.mean
        return (
            f"{self.read_back.mean:.4f} nats, merged model {self.merged.mean:.4f} ({change:+.4f})"
        )

    def as_json(self) -> dict[str, Any]:
        """The figures by name."""
        loss = None
        if self.merged.targets:
            loss = {
                "rows": self.merged.rows,
                "of": self.merged.purpose,
                "targets": self.merged.targets,
                "merged": self.merged.mean,
                "gguf": self.read_back.mean,
            }
        return {"proof": self.likeness.as_json(), "loss": loss}


def check_exports(run: Run, base: SafetensorsFolder) -> None:
    """Refuse an impossible export before anything is merged."""
    recipe = run.recipe
    if recipe.merge.gguf is not None:
        trusts = recipe.model.trust_remote_code
        config = read_config(str(base.folder), trust_remote_code=trusts)
        check_gguf(recipe.merge.gguf, recipe.train.stage, config, run.result_tokenizer)
    if recipe.merge.push is not None:
        check_upload(recipe.merge.push)


def export(run: Run, figures: dict[str, Any], card: ModelCard) -> None:
    """Write the GGUF file and upload, as the recipe says; add figures to `figures` and the card."""
    recipe, run_dir = run.recipe, run.folder
    folders = {"": run_dir.merged}
    if recipe.merge.gguf is not None:
        figures["gguf"] = write_gguf_folder(run, recipe.merge.gguf, card)
        write_json(run_dir.merge_figures, figures)
        write_text(run_dir.merged / "README.md", render_card(card, is_adapter=False))
        say(f"GGUF: {run_dir.gguf}")
        folders["gguf"] = run_dir.gguf
    if recipe.merge.push is not None:
        address = upload(folders, recipe.merge.push, private=recipe.merge.private)
        say(f"uploaded: {address}")


def write_gguf_folder(run: Run, kind: str, card: ModelCard) -> dict[str, Any]:
    """Write the merged model as GGUF with a Modelfile; return the figures of its verification.

    Adds them to `card`. Raises `ProofError`, and leaves no file, if its outputs differ too much.
    """
    from yrunner.models.export.ollama import modelfile
    from yrunner.models.gguf.quantize import K_QUANTS, stored_types
    from yrunner.models.gguf.read import open_gguf

    recipe, run_dir, tokenizer = run.recipe, run.folder, run.result_tokenizer
    checkpoint = open_checkpoint(str(run_dir.merged))
    name = f"{recipe.name}-{kind}.gguf"
    figures: dict[str, Any] = {"file": name, "kind": kind}
    with whole_folder(run_dir.gguf, _bytes_needed(checkpoint, kind)) as partial:
        _write_file(run, checkpoint, partial / name, kind)
        figures["bytes"] = (partial / name).stat().st_size
        if kind in K_QUANTS:
            types = stored_types(open_gguf(partial / name).tensors)
            say(f"GGUF {kind}, {figures['bytes'] / 1e6:,.0f} MB: matrices {types.in_words()}")
            if types.fallback:
                warn(types.fallback_in_words())
            figures |= {"types": types.matrices, "fallback": types.fallback}
            card.figures.append((f"GGUF {kind}, matrices", types.in_words()))
        text, lack = modelfile(
            name, tokenizer, GenerationConfig.from_pretrained(run_dir.merged), recipe.data.system
        )
        write_text(partial / "Modelfile", text)
        if lack:
            warn(f"the Modelfile cannot express {lack}")
        figures |= {"proof": None, "loss": None}
        if recipe.merge.verify:
            found = _prove(run, partial / name)
            if found is not None:
                figures |= found.as_json()
                _report(found, kind, card)
    return figures


def _bytes_needed(checkpoint: SafetensorsFolder, kind: str) -> int:
    """Bytes on the disk while a file of this type is written, with the file to quantize from."""
    from yrunner.models.gguf.quantize import K_QUANTS

    # The quantized file has a byte per number at most, a little more with its scales.
    sizes = {"f32": 4.0, "f16": 2.0, "bf16": 2.0}
    unrounded = sizes[UNROUNDED.get(checkpoint.main_dtype(), "f32")] if kind in K_QUANTS else 0.0
    numbers = sum(size.numel() for size in checkpoint.sizes.values())
    return int(numbers * (sizes.get(kind, 1.1) + unrounded))


def _write_file(run: Run, checkpoint: SafetensorsFolder, file: Path, kind: str) -> None:
    """Write the GGUF file. For K-quants llama.cpp makes it from one that is not rounded."""
    from yrunner.models.gguf.quantize import K_QUANTS, quantize
    from yrunner.models.gguf.write import write_gguf

    first, first_kind = file, kind
    if kind in K_QUANTS:
        first_kind = UNROUNDED.get(checkpoint.main_dtype(), "f32")
        first = file.with_suffix(".unrounded")
    with progress(f"GGUF {first_kind}, weights", len(checkpoint.sizes)) as advance:
        write_gguf(
            checkpoint,
            AutoConfig.from_pretrained(run.folder.merged),
            run.result_tokenizer,
            first,
            kind=first_kind,
            name=run.recipe.name,
            advance=advance,
        )
    if first != file:
        with progress(f"GGUF {kind}, weights", len(checkpoint.sizes)) as advance:
            quantize(first, file, kind, threads=torch.get_num_threads(), advance=advance)
        first.unlink()


def _prove(run: Run, file: Path) -> GGUFProof | None:
    """Read the file back, and compare it with the merged model; None if memory does not suffice."""
    from yrunner.models.gguf.read import open_gguf, read_gguf
    from yrunner.models.gguf.tokenizer import read_tokenizer

    merged = run.folder.merged
    prove_tokens(read_tokenizer(open_gguf(file).fields, file.name), run.result_tokenizer)
    needed = 4 * sum(size.numel() for size in open_checkpoint(str(merged)).sizes.values())
    if needed > free_memory():
        warn(f"the GGUF file is not verified: reading it back needs {needed:,} bytes of memory")
        return None
    probes = probes_of(run)
    model = load_model(
        str(merged),
        dtype=torch.float32,
        trust_remote_code=run.recipe.model.trust_remote_code,
    )
    expected_NV = logits_at(model, probes)
    expected = losses_of_rows(run, model, "loss, merged model")
    del model
    gc.collect()
    read_back = read_gguf(file, AutoConfig.from_pretrained(merged))
    kind = str(run.recipe.merge.gguf)
    name, error = largest_weight_error(open_checkpoint(str(merged)), read_back)
    if not error <= WEIGHT_BARS[kind]:
        raise ProofError(
            f"in the GGUF file {name} is {error:.2%} of its size away from the merged model's "
            f"(allowed: {WEIGHT_BARS[kind]:.1%})",
            remedy="it was removed; please report this, or keep it with merge.verify=false",
        )
    say(f"GGUF {kind}: no weight is farther than {error:.2%} of its size, that of {name}")
    likeness = compare(expected_NV, logits_at(read_back, probes))
    say_likeness(f"GGUF {kind} against the merged model", likeness)
    judge(likeness, GGUF_BARS[kind], "the GGUF file")
    return GGUFProof(likeness, expected, losses_of_rows(run, read_back, f"loss, GGUF {kind}"))


def _report(found: GGUFProof, kind: str, card: ModelCard) -> None:
    """Print the loss, and add all figures to the card."""
    card.figures.append(figure_of(f"GGUF {kind} against the merged model", found.likeness))
    if found.loss_in_words:
        what = f"GGUF {kind}, loss on {found.merged.in_words}"
        say(f"{what}: {found.loss_in_words}")
        card.figures.append((what, found.loss_in_words))


def prove_tokens(read_back: Any, tokenizer: Any) -> None:
    """Raise `ProofError` if a GGUF file's tokenizer has other tokens or other ids of a chat."""
    if read_back.get_vocab() != tokenizer.get_vocab():
        raise ProofError(
            "the GGUF file has other tokens than the tokenizer",
            remedy="the file was removed; please report this",
        )
    for text in FIXED_TEXTS:
        sample = text
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": text}]
            sample = str(tokenizer.apply_chat_template(chat, tokenize=False))
        if not _same_tokens(read_back, tokenizer, sample):
            raise ProofError(
                f'the GGUF tokenizer encodes "{text[:40]}..." differently',
                remedy="the file was removed; please report this",
            )
    if not all(_same_tokens(read_back, tokenizer, text) for text in FIXED_TEXTS):
        warn(
            "llama.cpp encodes chats as this tokenizer does, but does not add the leading space "
            "that this tokenizer adds to plain text"
        )


def _same_tokens(one: Any, other: Any, text: str) -> bool:
    found, expected = (each(text, add_special_tokens=False).input_ids for each in (one, other))
    return bool(found == expected)
