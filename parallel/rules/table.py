"""Which settings cannot run together, and what to change: the table of rules (no torch).

Each rule looks at a `Case`. Most of the limits of DeepSpeed behind the rules were seen in a run; the message says what
the engine would do.
"""

from collections.abc import Callable, Iterator
from math import gcd

from common.errors import Problem
from common.wording import either, listed
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.layout import divisors
from parallel.rules.model_traits import ModelTraits
from parallel.rules.rule import Case, Rule, legal_expert_degrees, legal_tensor_degrees, nearest_multiples


def problems(parallel: ParallelConfig, precision: PrecisionConfig, world_size: int | None,
             model: ModelTraits) -> Iterator[Problem]:
    """A Problem for every broken rule. Rules about the number of ranks are left out while `world_size` is None."""
    case = Case(parallel, precision, model, world_size)
    for rule in RULES:
        if rule.broken(case):
            where = model.keys.get(rule.where, rule.where)
            yield Problem(where, rule.asked(case), rule.possible(case), rule.change(case))


def _tensor_divides(name: str, where: str, what: str, size: Callable[[ModelTraits], int], *, otherwise: str) -> Rule:
    """The tensor ranks divide `what` evenly. `otherwise`, the other change, may use {multiples} and {tensor}."""

    def possible(case: Case) -> str:
        fitting = divisors(size(case.model))
        shown = listed(fitting[:12]) + (", ..." if len(fitting) > 12 else "")
        return f"parallel.tensor one of {shown} (a divisor of {size(case.model)})"

    def change(case: Case) -> str:
        multiples = either(nearest_multiples(size(case.model), case.parallel.tensor))
        return (f"set parallel.tensor to one of {listed(legal_tensor_degrees(case.model))} (they fit the whole model), "
                "or " + otherwise.format(multiples=multiples, tensor=case.parallel.tensor))

    return Rule(
        name=name,
        where=where,
        broken=lambda case: size(case.model) % case.parallel.tensor != 0,
        asked=lambda case: f"{size(case.model)} {what} over parallel.tensor={case.parallel.tensor} ranks",
        possible=possible,
        change=change,
    )


def _context_divides(name: str, where: str, what: str, size: Callable[[ModelTraits], int]) -> Rule:
    """In attention the context ranks share out the heads that each tensor rank holds."""

    def change(case: Case) -> str:
        common = gcd(case.model.heads, case.model.kv_heads)
        fitting = divisors(common // case.parallel.tensor) if common % case.parallel.tensor == 0 else [1]
        return (f"set parallel.context to {either(fitting)} (with tensor={case.parallel.tensor}), or {where} to "
                f"{either(nearest_multiples(size(case.model), case.head_ranks))}")

    return Rule(
        name=name,
        where=where,
        broken=lambda case: not case.model.why_no_context and size(case.model) % case.parallel.tensor == 0
        and size(case.model) % case.head_ranks != 0,
        asked=lambda case: f"{size(case.model)} {what} over tensor={case.parallel.tensor} x "
        f"context={case.parallel.context} ranks",
        possible=lambda case: f"a multiple of {case.head_ranks} {what}: in attention every rank has the whole "
        "sequence and a part of the heads",
        change=change,
    )


def _split_asked(case: Case) -> str:
    sequence = f"tensor={case.parallel.tensor} ranks by parallel.sequence"
    context = f"context={case.parallel.context}"
    if not case.parallel.sequence:
        return f"{context} ranks"
    return sequence if case.parallel.context == 1 else f"{context} x {sequence}"


def _split_change(case: Case) -> str:
    length, parallel = case.model.sequence_length, case.parallel
    without = "parallel.sequence=false and parallel.context=1"
    if length % parallel.context == 0:
        without = "parallel.sequence=false"
    elif not parallel.sequence or length % parallel.tensor == 0:
        without = "parallel.context=1"
    return f"set model.sequence_length to {either(nearest_multiples(length, case.sequence_unit))}, or {without}"


def _legal_micro_batches(case: Case) -> list[int]:
    share, remainder = divmod(case.parallel.global_batch, case.data or 1)
    return [] if remainder else divisors(share)


def _batch_change(case: Case) -> str:
    text = f"set parallel.global_batch to {either(nearest_multiples(case.parallel.global_batch, case.batch_unit))}"
    micro = sorted(_legal_micro_batches(case), key=lambda size: abs(size - case.parallel.micro_batch))[:3]
    return text + (f", or parallel.micro_batch to {either(sorted(micro))}" if micro else "")


RULES: tuple[Rule, ...] = (
    Rule(
        name="world-divides",
        where="parallel",
        broken=lambda c: c.world_size is not None and c.world_size % c.parallel.model_ranks != 0,
        asked=lambda c: f"{c.world_size} ranks for tensor={c.parallel.tensor}"
        + (f" x context={c.parallel.context}" if c.parallel.context > 1 else "") + f" x pipeline={c.parallel.pipeline}",
        possible=lambda c: f"a multiple of {c.parallel.model_ranks} ranks (the rest is the data degree)",
        change=lambda c: f"start {either(nearest_multiples(c.num_ranks, c.parallel.model_ranks))} ranks, or choose "
        f"degrees whose product is one of {listed(divisors(c.num_ranks))}",
    ),
    _tensor_divides("tensor-heads", "model.heads", "attention heads", lambda m: m.heads,
                    otherwise="model.heads to {multiples}"),
    _tensor_divides("tensor-kv-heads", "model.kv_heads", "key and value heads", lambda m: m.kv_heads,
                    otherwise="model.kv_heads to {multiples}"),
    _tensor_divides("tensor-ffn", "model.ffn", "columns of the feed-forward matrix", lambda m: m.ffn,
                    otherwise="model.ffn to {multiples}"),
    _tensor_divides("tensor-vocab", "model.vocab_size", "rows of the embedding (model.vocab_size, padded)",
                    lambda m: m.vocab_size,
                    otherwise="pad the vocabulary: model.pad_vocab_to={tensor} or a multiple of it"),
    _tensor_divides("tensor-expert-ffn", "model.expert_ffn", "columns of an expert's matrix", lambda m: m.expert_ffn,
                    otherwise="model.expert_ffn to {multiples}"),
    _tensor_divides("tensor-shared-expert-ffn", "model.shared_expert_ffn", "columns of the shared expert's matrix",
                    lambda m: m.shared_expert_ffn, otherwise="model.shared_expert_ffn to {multiples}"),
    Rule(
        name="expert-needs-experts",
        where="parallel.expert",
        broken=lambda c: c.parallel.expert > 1 and c.model.experts == 0,
        asked=lambda c: f"expert={c.parallel.expert} for a model without experts",
        possible=lambda c: "expert=1 where every layer is dense (model.experts=0)",
        change=lambda c: f"set parallel.expert=1, or model.experts to a multiple of {c.parallel.expert}",
    ),
    Rule(
        name="expert-divides",
        where="model.experts",
        broken=lambda c: c.model.experts % c.parallel.expert != 0,
        asked=lambda c: f"{c.model.experts} experts over parallel.expert={c.parallel.expert} ranks",
        possible=lambda c: f"parallel.expert one of {listed(divisors(c.model.experts))} (a divisor of "
        f"{c.model.experts}): each rank holds as many experts",
        change=lambda c: f"set parallel.expert to one of {listed(legal_expert_degrees(c))}, or model.experts to "
        f"{either(nearest_multiples(c.model.experts, c.parallel.expert))}",
    ),
    Rule(
        name="expert-data",
        where="parallel.expert",
        broken=lambda c: c.data is not None and c.model.experts > 0 and c.data % c.parallel.expert != 0,
        asked=lambda c: f"expert={c.parallel.expert} with {c.data} data ranks ({c.world_size} ranks in models of "
        f"{c.parallel.model_ranks})",
        possible=lambda c: f"expert one of {listed(divisors(c.data or 1))} (a divisor of {c.data}): data ranks share "
        "the experts",
        change=lambda c: f"set parallel.expert to one of {listed(legal_expert_degrees(c))}, or start "
        f"{either(nearest_multiples(c.num_ranks, c.parallel.model_ranks * c.parallel.expert))} ranks",
    ),
    Rule(
        name="expert-zero",
        where="parallel.zero_stage",
        broken=lambda c: c.parallel.expert > 1 and c.parallel.zero_stage == 3,
        asked=lambda c: f"zero_stage=3 with expert={c.parallel.expert}",
        possible=lambda c: "zero_stage 0, 1 or 2 with expert parallelism: at stage 3 DeepSpeed cuts every parameter "
        "over all data ranks, which do not hold the same experts",
        change=lambda c: "set parallel.zero_stage=2, or parallel.expert=1 to keep stage 3",
    ),
    Rule(
        name="sequence-needs-tensor",
        where="parallel.sequence",
        broken=lambda c: c.parallel.sequence and c.parallel.tensor == 1,
        asked=lambda c: "sequence=true with tensor=1",
        possible=lambda c: "sequence=true with tensor of at least 2: it splits over the tensor ranks, and one rank "
        "has nothing to split",
        change=lambda c: "set parallel.sequence=false, or parallel.tensor to one of "
        f"{listed(legal_tensor_degrees(c.model)[1:]) or 'at least 2'}",
    ),
    Rule(
        name="sequence-divides",
        where="model.sequence_length",
        broken=lambda c: not c.model.pads_sequence and c.model.sequence_length % c.sequence_unit != 0,
        asked=lambda c: f"{c.model.sequence_length} tokens split over {_split_asked(c)}",
        possible=lambda c: f"a multiple of {c.sequence_unit} tokens",
        change=_split_change,
    ),
    Rule(
        name="target-divides",
        where="model.target_length",
        broken=lambda c: c.parallel.sequence and (c.model.target_length or 0) % c.parallel.tensor != 0,
        asked=lambda c: f"{c.model.target_length} decoder tokens split over tensor={c.parallel.tensor} ranks by "
        "parallel.sequence",
        possible=lambda c: f"a multiple of {c.parallel.tensor} tokens",
        change=lambda c: "set model.target_length to "
        f"{nearest_multiples(c.model.target_length or 0, c.parallel.tensor)[-1]} (what is too much is filled up), or "
        "parallel.sequence=false",
    ),
    Rule(
        name="context-supported",
        where="parallel.context",
        broken=lambda c: c.parallel.context > 1 and bool(c.model.why_no_context),
        asked=lambda c: f"context={c.parallel.context}",
        possible=lambda c: f"context=1: {c.model.why_no_context}",
        change=lambda c: "set parallel.context=1; parallel.tensor with parallel.sequence=true also shares out "
        "activations along the sequence",
    ),
    _context_divides("context-heads", "model.heads", "attention heads", lambda m: m.heads),
    _context_divides("context-kv-heads", "model.kv_heads", "key and value heads", lambda m: m.kv_heads),
    Rule(
        name="pipeline-supported",
        where="parallel.pipeline",
        broken=lambda c: c.parallel.pipeline > 1 and not c.model.pipeline_supported,
        asked=lambda c: f"pipeline={c.parallel.pipeline}",
        possible=lambda c: f"pipeline=1: {c.model.why_no_pipeline}",
        change=lambda c: "set parallel.pipeline=1",
    ),
    Rule(
        name="pipeline-blocks",
        where="parallel.pipeline",
        broken=lambda c: c.parallel.num_stages > c.model.layers,
        asked=lambda c: f"pipeline={c.parallel.pipeline} " + ("(two stages a rank with schedule=dualpipev) " if
        c.parallel.v_shaped else "stages ") + f"from {c.model.layers} blocks",
        possible=lambda c: f"1 to {c.model.layers} stages: each holds at least one block",
        change=lambda c: f"set parallel.pipeline to {c.model.layers // (2 if c.parallel.v_shaped else 1)} or less"
        + (", or parallel.schedule=1f1b" if c.parallel.v_shaped else ""),
    ),
    Rule(
        name="schedule-needs-pipeline",
        where="parallel.schedule",
        broken=lambda c: c.parallel.v_shaped and c.parallel.pipeline == 1,
        asked=lambda c: "schedule=dualpipev with pipeline=1",
        possible=lambda c: "dualpipev with pipeline of at least 2: one rank alone has nobody to hand activations to",
        change=lambda c: "set parallel.schedule=1f1b, or parallel.pipeline=2",
    ),
    Rule(
        name="dualpipev-batch",
        where="parallel.global_batch",
        broken=lambda c: c.parallel.v_shaped and c.parallel.global_batch % c.batch_unit == 0
        and c.parallel.global_batch < c.batch_unit * c.parallel.num_stages,
        asked=lambda c: f"{c.parallel.global_batch // c.batch_unit} micro-batches a step with schedule=dualpipev and "
        f"pipeline={c.parallel.pipeline}",
        possible=lambda c: f"at least {c.parallel.num_stages}: {c.parallel.pipeline} ranks with two stages each",
        change=lambda c: f"set parallel.global_batch to {c.batch_unit * c.parallel.num_stages} or more, or "
        "parallel.schedule=1f1b",
    ),
    Rule(
        name="pipeline-zero",
        where="parallel.zero_stage",
        broken=lambda c: c.parallel.pipeline > 1 and c.parallel.zero_stage > 1,
        asked=lambda c: f"zero_stage={c.parallel.zero_stage} with pipeline={c.parallel.pipeline}",
        possible=lambda c: "zero_stage 0 or 1 in a pipeline: DeepSpeed's pipeline engine refuses stages 2 and 3, which "
        "would exchange gradients or weights again for every micro-batch",
        change=lambda c: f"set parallel.zero_stage=1, or parallel.pipeline=1 to keep stage {c.parallel.zero_stage}",
    ),
    Rule(
        name="batch-divides",
        where="parallel.global_batch",
        broken=lambda c: c.parallel.global_batch % c.batch_unit != 0,
        asked=lambda c: f"global_batch={c.parallel.global_batch} from micro_batch={c.parallel.micro_batch}"
        + (f" on {c.data} data ranks" if c.data else ""),
        possible=lambda c: f"a multiple of {c.batch_unit}"
        + (" (micro_batch x data ranks)" if c.data else " (micro_batch), times the data ranks"),
        change=_batch_change,
    ),
    Rule(
        name="fp8",
        where="precision.compute",
        broken=lambda c: c.precision.compute == "fp8",
        asked=lambda c: "fp8",
        possible=lambda c: "fp32, bf16 and fp16: fp8 needs scaled matrix products and a history of their scales, which "
        "no layer here has yet",
        change=lambda c: "set precision.compute=bf16",
    ),
    Rule(
        name="offload-zero",
        where="parallel.offload",
        broken=lambda c: c.parallel.offload != "none" and c.parallel.zero_stage == 0,
        asked=lambda c: f"offload={c.parallel.offload} with zero_stage=0",
        possible=lambda c: "zero_stage of at least 1: at stage 0 DeepSpeed ignores offload without a word",
        change=lambda c: f"set parallel.zero_stage={3 if c.parallel.offload == 'parameters' else 1} (on one data rank "
        "stage 1 splits nothing and only moves the optimizer), or parallel.offload=none",
    ),
    Rule(
        name="offload-folder",
        where="parallel.offload_folder",
        broken=lambda c: bool(c.parallel.offload_folder) and c.parallel.offload == "none",
        asked=lambda c: f"offload_folder={c.parallel.offload_folder} with offload=none",
        possible=lambda c: "a folder with offload=optimizer or parameters: otherwise nothing would lie in it",
        change=lambda c: "set parallel.offload=optimizer, or leave parallel.offload_folder empty",
    ),
    Rule(
        name="offload-parameters",
        where="parallel.offload",
        broken=lambda c: c.parallel.offload == "parameters" and c.parallel.zero_stage in (1, 2)
        and c.parallel.pipeline == 1,
        asked=lambda c: f"offload=parameters with zero_stage={c.parallel.zero_stage}",
        possible=lambda c: "zero_stage=3, which fetches each layer's weights when they are used; "
        "offload=optimizer with stages 1, 2 and 3",
        change=lambda c: "set parallel.offload=optimizer, or parallel.zero_stage=3",
    ),
    Rule(
        name="offload-parameters-pipeline",
        where="parallel.offload",
        broken=lambda c: c.parallel.offload == "parameters" and c.parallel.pipeline > 1,
        asked=lambda c: f"offload=parameters with pipeline={c.parallel.pipeline}",
        possible=lambda c: "pipeline=1: weights go to host memory at stage 3 alone, which the pipeline engine refuses",
        change=lambda c: "set parallel.pipeline=1 and parallel.zero_stage=3, or parallel.offload=none",
    ),
    Rule(
        name="loss-chunks",
        where="parallel.loss_chunk_tokens",
        broken=lambda c: c.parallel.loss_chunk_tokens > 0 and not c.model.predicts_tokens,
        asked=lambda c: f"loss_chunk_tokens={c.parallel.loss_chunk_tokens} for a model without logits of a vocabulary",
        possible=lambda c: "loss_chunk_tokens=0: its loss compares samples and has no logits to cut",
        change=lambda c: "set parallel.loss_chunk_tokens=0",
    ),
    Rule(
        name="recompute-every",
        where="parallel.recompute_every",
        broken=lambda c: c.parallel.recompute_every > 1 and c.parallel.recompute == "none",
        asked=lambda c: f"recompute_every={c.parallel.recompute_every} with recompute=none",
        possible=lambda c: "recompute_every=1 where nothing is recomputed",
        change=lambda c: "set parallel.recompute=full or selective, or parallel.recompute_every=1",
    ),
    Rule(
        name="recompute-blocks",
        where="parallel.recompute_every",
        broken=lambda c: c.parallel.recompute_every > c.model.layers,
        asked=lambda c: f"recompute_every={c.parallel.recompute_every} of {c.model.layers} blocks",
        possible=lambda c: f"1 to {c.model.layers}",
        change=lambda c: f"set parallel.recompute_every to {c.model.layers} or less",
    ),
    Rule(
        name="fp16-zero",
        where="parallel.zero_stage",
        broken=lambda c: c.precision.compute == "fp16" and c.parallel.zero_stage == 0,
        asked=lambda c: "precision.compute=fp16 with zero_stage=0",
        possible=lambda c: "fp16 with zero_stage of at least 1, whose optimizer scales the loss; "
        + "bf16 and fp32 with any stage",
        change=lambda c: "set parallel.zero_stage=1 (on one data rank it holds the same bytes), or "
        "precision.compute=bf16",
    ),
)
