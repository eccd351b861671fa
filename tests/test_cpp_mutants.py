"""Planted bugs in the C++ kernels; the check before a run must find each of them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import check, cpp
from kernels.configuration import operations
from tests.mutation import replaced
from tests.numerics import on_threads

MUTANTS = {
    "bf16 cut off": ("(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
    "the first bucket alone": ("buckets[-distance * length]", "buckets[0]"),
    "buckets of the keys": (
        "buckets[-distance * length] : buckets[distance]",
        "buckets[-distance] : buckets[distance * length]",
    ),
    "other random numbers": ("0x85EBCA6Bu", "0x85EBCA6Du"),
    "dropped and not scaled": (
        "return scale * static_cast<float>(word >= limit)",
        "return static_cast<float>(word >= limit)",
    ),
    "no score by query": ("row[block + lane] = of_query + wide(", "row[block + lane] = wide("),
    "no score by near keys": (
        "row[j] = wide(query[bucket]) + wide(keys[",
        "row[j] = wide(query[bucket]) + 0 * wide(keys[",
    ),
    "no score by far keys": ("of_query + wide(key[block + lane])", "of_query"),
    "near keys counted from the row's begin": (
        "bucket = run.bucket - (first - i - run.first); j < last; j++, bucket--)\nrow",
        "bucket = run.bucket; j < last; j++, bucket--)\nrow",
    ),
    "a run that writes too little": (
        "for (int32_t lane = 0; lane < VECTOR; lane++)\nrow",
        "for (int32_t lane = 0; lane < VECTOR - 1; lane++)\nrow",
    ),
    "the keys of another row": ("batch + in_batch) * length, length, keys", "batch) * length, length, keys"),
    "the last keys forgotten": ("std::min(length, (last + step - 1) / step * step)", "last / step * step"),
    "something before what is seen": ("row + range.first, bf16{0}", "row + range.first, bf16{0x3f80}"),
    "something behind what is seen": ("row + length, bf16{0}", "row + length, bf16{0x3f80}"),
    "something for queries that see nothing": (" * static_cast<float>(is_visible[j])", ""),
    "the mask of another row": ("mask + (in_batch * length + i) * length", "mask + i * length"),
    "no divisor": ("sum == 0.0f ? 0.0f : 1.0f / sum", "1.0f"),
    "the softmax's sum forgotten": ("row[j] -= wide(probability[j]) * sum;", ""),
    "gradients of a query's runs overwritten": ("query[run.bucket] += total", "query[run.bucket] = total + 0.01f"),
    "gradients of keys not kept": ("key[block + lane] += value", "key[block + lane] = value"),
    "gradients of a run and of what follows": ("lane < left ? row[block + lane] : 0.0f", "row[block + lane]"),
    "gradients of one vector of a run": ("sums[lane] += value", "sums[lane] = value"),
    "near queries counted from the row's begin": ("query[bucket - d] +=", "query[run.bucket - d] +="),
    "near keys of another query": ("+ first + d] += row", "+ run.first + d] += row"),
    "gelu without its cube": ("-scale * (x + cubic * x * x * x)", "-scale * x"),
    "the tail of a positive": ("x > 0.0f ? 1.0f - tail : tail", "tail"),
    "slope without the bell": ("share + x * bell * 0.39894228f", "share"),
    "no mean": ("out[i] = narrow((v[i] - mean) * inverse_std)", "out[i] = narrow(v[i] * inverse_std)"),
    "no epsilon's variance": ("squares / size + eps", "squares / (size - 1) + eps"),
    "the gradient's mean left in": ("(wide(dy[i]) - sum - value[i] * along)", "(wide(dy[i]) - value[i] * along)"),
    "the gradient along the norm left in": ("(wide(dy[i]) - sum - value[i] * along)", "(wide(dy[i]) - sum)"),
    "heads mixed up": (
        "grad_linear + row * grad_linear_row + group * grad_linear_group",
        "grad_linear + row * grad_linear_row",
    ),
    "the newest without its weight": ("sum[i] = own * y[i]", "sum[i] = y[i]"),
    "the oldest left out": ("for (int64_t m = 0; m < depth; m++) add(", "for (int64_t m = 1; m < depth; m++) add("),
    "weights of the wrong depth": ("alphas[m * capacity + depth], n", "alphas[depth * capacity + m], n"),
    "one product too few": (
        "for (int64_t m = 0; m <= depth; m++) {\nconst bf16* y",
        "for (int64_t m = 0; m < depth; m++) {\nconst bf16* y",
    ),
    "one thread's part": (
        "grad_alpha[m] += parts[thread * (depth + 1) + m]",
        "grad_alpha[m] = parts[thread * (depth + 1) + m]",
    ),
    "the last piece left out": ("(size + PIECE - 1) / PIECE", "size / PIECE"),
    "the last row left out": (
        "for (int64_t row = 0; row < rows; row++) {\nconst bf16* entries",
        "for (int64_t row = 1; row < rows; row++) {\nconst bf16* entries",
    ),
    "a wrong label's loss": ("static_cast<float>(log_sum - target)", "static_cast<float>(log_sum)"),
    "ties for everybody": (" && is_first; i++) is_first", " && false; i++) is_first"),
    "every label is the largest": ("bool is_first = target == 0.0f", "bool is_first = true"),
    "no bias": ("wide(x[first + i]) + bias[first + i]", "wide(x[first + i])"),
    "no bias of the label": ("wide(x[label]) + bias[label] - most", "wide(x[label]) - most"),
    "no bias where equals are looked for": ("wide(x[i]) + bias[i] != most", "wide(x[i]) != most"),
    "blocks counted from their own largest": ("sums[block]) * largest[block]", "sums[block])"),
    "gradients counted from their block's largest": ("of_block = factor * largest[block]", "of_block = factor"),
    "the label's share of its block": ("static_cast<double>(own) * largest[label / BLOCK]", "own"),
    "the label among the others": (
        "if (label / BLOCK == block) std::swap",
        "if (label / BLOCK == block && false) std::swap",
    ),
    "a product overwritten": ("total[i] += wide(product[i])", "total[i] = wide(product[i])"),
    "a product added to what is no number": ("if (is_first)", "if (false)"),
    "the last of a product left out": ("std::min(size, first + BLOCK)", "std::min(size - 1, first + BLOCK)"),
    "every row has the first segment's scale": ("scales[segments[index * segment_stride]]", "scales[segments[0]]"),
    "every segment has the first one's scale": ("scales[segments[index * segment_stride]]", "scales[0]"),
    "no gradient of the z-loss": ("scale * (1.0 + of_z_loss) / sum", "scale / sum"),
    "not clipped": ("g = grad[i] * clip", "g = grad[i]"),
    "moments exchanged": (
        "exp_avg[i] = m;\nexp_avg_sq[i] = v;",
        "exp_avg[i] = v;\nexp_avg_sq[i] = m;",
    ),
    "no decay": (" + decay * param;", ";"),
    "eps inside the root": ("(std::sqrt(exp_avg_sq * second) + eps)", "std::sqrt(exp_avg_sq * second + eps)"),
    "factors of age exchanged": ("1.0 / (1.0 - std::pow(beta1, age))", "1.0 / (1.0 - std::pow(beta2, age))"),
    "age not kept": ("*steps[tensor] += 1.0f;", ""),
    "ratio inverted": ("std::sqrt(norms[0] / norms[1])", "std::sqrt(norms[1] / norms[0])"),
    "ratio without decay": ("decays[tensor] != 0.0 && norms[0]", "norms[0]"),
    "ratio of one chunk": ("norms[which] += sums[which][chunk]", "norms[which] = sums[which][chunk]"),
    "norm without the last chunk": (
        "for (double sum : sums) norm[0] += sum;",
        "for (double sum : sums) norm[0] += sum; norm[0] -= sums.back();",
    ),
    "average of the old parameter": (
        "average_rest * (param[i] - average[i])",
        "average_rest * (param[i] + step * exp_avg[i] - average[i])",
    ),
    "the label like any other": ("out[label] = narrow(", "narrow("),
}

MARGIN = 4096  # bytes
# Wrong only in memory that is not theirs.
PAST_THE_END = {
    "sums of mixes": ("i < count; i++) sum[i] += weight", "i <= count; i++) sum[i] += weight"),
    "sums of columns": ("std::copy(sum, sum + count, ", "std::copy(sum, sum + count + 1, "),
    "a row of the norm": (
        "for (int64_t i = 0; i < size; i++) out[i]", "for (int64_t i = 0; i <= size; i++) out[i]"
    ),
    "an ignored row": ("std::fill(out, out + classes, bf16{0})", "std::fill(out, out + classes + 1, bf16{0})"),
    "products": ("last = std::min(size, first + BLOCK)", "last = std::min(size + 1, first + BLOCK)"),
    "a row of weights": (
        "std::fill(row + range.last, row + length, bf16{0})", "std::fill(row + range.last, row + length + 1, bf16{0})"
    ),
}  # fmt: skip


def operations_with(text):
    """Operations whose kernel source contains the text; all of them if it is in the shared header."""
    files = {op: Path(kernels.__file__).parent / op / "kernel.cpp" for op in operations("cpp")}
    sources = {op: "".join(file.read_text(encoding="utf-8").split()) for op, file in files.items()}
    return [op for op, source in sources.items() if "".join(text.split()) in source] or list(files)


@pytest.fixture(autouse=True)
def compiled_fast(monkeypatch):
    """Not optimized, in half of the time."""
    monkeypatch.setattr(cpp, "_FLAGS", (*cpp._FLAGS, "-O0"))


def test_without_a_bug_the_check_passes(monkeypatch):
    library = cpp.compiled(cpp.source())
    monkeypatch.setattr(cpp, "library", lambda: library)
    assert check.first_failure(on_threads(2, check.run_checks, torch.device("cpu"), "cpp")) is None


@pytest.mark.parametrize(("old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_a_planted_bug_in_cpp_is_found(monkeypatch, old, new):
    chosen = operations_with(old)
    needed = {*chosen, "add_bias"}  # cross-entropy takes its sums of columns
    mutant = cpp.compiled(replaced(cpp.source(*sorted(needed)), old, new))
    monkeypatch.setattr(cpp, "library", lambda: mutant)
    monkeypatch.setattr(check, "operations", lambda backend: chosen)
    assert check.first_failure(on_threads(2, check.run_checks, torch.device("cpu"), "cpp"))


@pytest.fixture
def fence():
    """A byte: of numbers so small that a sum with them is another."""
    return 1


@pytest.fixture
def trespasses(monkeypatch, fence):
    """Kernels get copies of their tensors' memory, between fences; the names of those that change a fence."""
    call, found = cpp.call, []

    def between_fences(name, arguments):
        tensors = [each for each in arguments if isinstance(each, torch.Tensor) and each.numel()]
        memories = {tensor.untyped_storage().data_ptr(): content_of(tensor) for tensor in tensors}
        fenced = {start: F.pad(memory, (MARGIN, MARGIN), value=fence) for start, memory in memories.items()}

        def moved(argument):
            if not any(argument is tensor for tensor in tensors):
                return argument
            start = argument.untyped_storage().data_ptr()
            return fenced[start][MARGIN + argument.data_ptr() - start :]

        call(name, [moved(argument) for argument in arguments])
        for start, memory in memories.items():
            memory.copy_(fenced[start][MARGIN:-MARGIN])
            if (fenced[start][:MARGIN] != fence).any() or (fenced[start][-MARGIN:] != fence).any():
                found.append(name)

    monkeypatch.setattr(cpp, "call", between_fences)
    return found


def content_of(tensor):
    """The bytes of all memory that a tensor is in."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


@pytest.mark.parametrize("fence", [1, 255])  # NaN, which what reads it shows
def test_kernels_touch_the_memory_of_their_tensors_alone(monkeypatch, trespasses):
    library = cpp.compiled(cpp.source())
    monkeypatch.setattr(cpp, "library", lambda: library)
    assert check.first_failure(check.run_checks(torch.device("cpu"), "cpp")) is None
    assert trespasses == []


@pytest.mark.parametrize(("old", "new"), PAST_THE_END.values(), ids=PAST_THE_END)
def test_what_is_touched_past_the_end_is_found(monkeypatch, trespasses, old, new):
    (chosen,) = operations_with(old)
    mutant = cpp.compiled(replaced(cpp.source(*{chosen, "add_bias"}), old, new))
    monkeypatch.setattr(cpp, "library", lambda: mutant)
    check.run_checks(torch.device("cpu"), "cpp", ops=[chosen])
    assert trespasses
