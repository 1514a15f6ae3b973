"""Verification of a merged model, and its export to GGUF and to the Hub."""

from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from yrunner.assembly.dataset import first_examples
from yrunner.assembly.run import Run
from yrunner.console import progress, say, warn
from yrunner.errors import MissingError, ProofError
from yrunner.machine import free_memory
from yrunner.models.export.upload import check_upload, upload
from yrunner.models.merge.proof import (
    LogitAgreement,
    Probes,
    Tolerance,
    compare,
    folder_logits,
    logits_at,
)
from yrunner.models.merge.safetensors_io import SafetensorsFolder, open_checkpoint
from yrunner.models.meta import read_config
from yrunner.storage.run_dir import whole_folder, write_json, write_text

NUM_ROWS = 16
MOST_TOKENS = 128
"""Per text."""
FIXED_TEXTS = (
    "The harbour was quiet that morning. Nobody had told the new keeper that the lamp on the "
    "eastern pier had not been lit for seven years.",
    "第三条 本规定自公布之日起施行。有下列情形之一的，由主管部门责令改正，并处一万元以上三万元以下"
    "罚款。",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([1, 2, 3.5]))\n",
    "12 + 30 = 42; 7 * 8 = 56; 1,000,000 / 4 = 250,000. 2026-03-01, 09:45.",
)
"""Kinds of text that the recipe's rows may lack."""
BARS = {
    torch.float32: Tolerance(top1_agreement=0.999, mean_kl=1e-6, largest_difference=1e-3),
    torch.float16: Tolerance(top1_agreement=0.99, mean_kl=1e-3),
    torch.bfloat16: Tolerance(top1_agreement=0.97, mean_kl=1e-2),
}
"""Tolerances by the dtype of the merged weights, which round to 24, 11 or 8 bits."""
GGUF_BARS = {
    "f32": Tolerance(top1_agreement=0.999, mean_kl=1e-6, largest_difference=1e-3),
    "f16": Tolerance(top1_agreement=0.99, mean_kl=1e-3),
    "bf16": Tolerance(top1_agreement=0.97, mean_kl=1e-2),
    "q8_0": Tolerance(top1_agreement=0.95, mean_kl=0.02),
    "q5_1": Tolerance(top1_agreement=0.85, mean_kl=0.1),
    "q5_0": Tolerance(top1_agreement=0.85, mean_kl=0.1),
    "q4_1": Tolerance(top1_agreement=0.75, mean_kl=0.3),
    "q4_0": Tolerance(top1_agreement=0.75, mean_kl=0.3),
}
"""Tolerances of a GGUF file against the merged model: fewer bits, wider tolerance."""


def probes_of(run: Run) -> Probes:
    """The first training rows, and some fixed texts."""
    tokenizer = run.result_tokenizer
    examples = first_examples(run.sources[0], tokenizer, NUM_ROWS, run.rules)
    rows = [example.input_ids for example in examples]
    fixed = [tokenizer(text).input_ids for text in FIXED_TEXTS]
    return Probes([ids[:MOST_TOKENS] for ids in [*rows, *fixed] if ids])


def judge(likeness: LogitAgreement, tolerance: Tolerance, what: str) -> None:
    """Raise `ProofError`, with the figures, if a result exceeds its tolerance."""
    faults = tolerance.faults(likeness)
    if faults:
        raise ProofError(
            f"the outputs of {what} differ too much: {'; '.join(faults)}",
            remedy="it was removed; please report this, or keep it with merge.verify=false",
        )


def say_likeness(what: str, likeness: LogitAgreement) -> None:
    """Print the figures in one line."""
    say(f"{what}, {likeness.tokens:,} tokens: {_in_words(likeness)}")


def figure_of(what: str, likeness: LogitAgreement) -> tuple[str, str]:
    """The figures for a model card."""
    return f"{what}, {likeness.tokens:,} tokens", _in_words(likeness)


def _in_words(likeness: LogitAgreement) -> str:
    return (
        f"same top token {likeness.top1_agreement:.2%}, "
        f"KL divergence {likeness.mean_kl:.2g} nats, "
        f"logits differ by {likeness.mean_difference:.2g} on average and "
        f"{likeness.largest_difference:.2g} at most"
    )


def check_exports(run: Run, base: SafetensorsFolder) -> None:
    """Refuse an impossible export before anything is merged."""
    recipe = run.recipe
    if recipe.merge.gguf is not None:
        if find_spec("gguf") is None:
            raise MissingError(
                "merge.gguf needs the package gguf", remedy="run pip install yrunner[gguf]"
            )
        from yrunner.models.gguf.tokenizer import check_tokenizer
        from yrunner.models.gguf.write import check_supported

        trusts = recipe.model.trust_remote_code
        check_supported(read_config(str(base.folder), trust_remote_code=trusts))
        check_tokenizer(run.result_tokenizer)
    if recipe.merge.push is not None:
        check_upload(recipe.merge.push)


def export(run: Run, figures: dict[str, Any]) -> None:
    """Write the GGUF file and upload, as the recipe says; add GGUF figures to `figures`."""
    recipe, run_dir = run.recipe, run.folder
    folders = {"": run_dir.merged}
    if recipe.merge.gguf is not None:
        figures["gguf"] = write_gguf_folder(run, recipe.merge.gguf)
        write_json(run_dir.merge_figures, figures)
        say(f"GGUF: {run_dir.gguf}")
        folders["gguf"] = run_dir.gguf
    if recipe.merge.push is not None:
        address = upload(folders, recipe.merge.push, private=recipe.merge.private)
        say(f"uploaded: {address}")


def write_gguf_folder(run: Run, kind: str) -> dict[str, Any]:
    """Write the merged model as GGUF with a Modelfile; return the figures of its verification.

    Raises `ProofError`, and leaves no file, if its outputs differ too much.
    """
    from yrunner.models.export.ollama import modelfile
    from yrunner.models.gguf.write import write_gguf

    recipe, run_dir, tokenizer = run.recipe, run.folder, run.result_tokenizer
    checkpoint = open_checkpoint(str(run_dir.merged))
    config = AutoConfig.from_pretrained(run_dir.merged)
    name = f"{recipe.name}-{kind}.gguf"
    with whole_folder(run_dir.gguf) as partial:
        with progress(f"GGUF {kind}, weights", len(checkpoint.sizes)) as advance:
            write_gguf(
                checkpoint,
                config,
                tokenizer,
                partial / name,
                kind=kind,
                name=recipe.name,
                advance=advance,
            )
        text, lack = modelfile(
            name, tokenizer, GenerationConfig.from_pretrained(run_dir.merged), recipe.data.system
        )
        write_text(partial / "Modelfile", text)
        if lack:
            warn(f"the Modelfile cannot express {lack}")
        proof = None
        if recipe.merge.verify:
            proof = _prove(run, partial / name, config)
    return {"file": name, "kind": kind, "proof": proof}


def _prove(run: Run, file: Any, config: Any) -> dict[str, Any] | None:
    from yrunner.models.gguf.read import open_gguf
    from yrunner.models.gguf.tokenizer import read_tokenizer
    from yrunner.models.gguf.write import read_gguf

    run_dir = run.folder
    prove_tokens(read_tokenizer(open_gguf(file).fields, file.name), run.result_tokenizer)
    needed = 4 * sum(size.numel() for size in open_checkpoint(str(run_dir.merged)).sizes.values())
    if needed > free_memory():
        warn(f"the GGUF file is not verified: reading it back needs {needed:,} bytes of memory")
        return None
    probes = probes_of(run)
    trusts = run.recipe.model.trust_remote_code
    expected_NV = folder_logits(run_dir.merged, probes, trust_remote_code=trusts)
    likeness = compare(expected_NV, logits_at(read_gguf(file, config), probes))
    kind = str(run.recipe.merge.gguf)
    say_likeness(f"GGUF {kind} against the merged model", likeness)
    judge(likeness, GGUF_BARS[kind], "the GGUF file")
    return likeness.as_json()


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
