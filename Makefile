PYTHON ?= python3
BIN := .venv/bin
OLDER := 4.51 5.0
TORCH ?= 2.11.0
DEMO := demo
# Python compiles what is imported; pip would compile all there is, which takes a minute.
PIP := python -m pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-torch test-stand-in test-faults fuzz soak lint lint-files docs bench clean install test-gpu gpu

install: .venv/.installed

.venv/.installed: pyproject.toml setup.py constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/$(PIP) -e ".[dev]" -c constraints.txt
	@touch $@

# The main job on real text: Python's own documentation, one masked and one causal rank.
demo: install
	@mkdir -p $(DEMO)
	$(BIN)/python tokenize_scripts/demo_corpus.py --output $(DEMO)/corpus.jsonl
	$(BIN)/python tokenize_scripts/split_corpus.py --input $(DEMO)/corpus.jsonl --output_dir $(DEMO)/split
	$(BIN)/python tokenize_scripts/train_tokenizer.py --input $(DEMO)/split/train.jsonl \
		--output $(DEMO)/tokenizer.json --vocab_size 1024
	for part in train validation; do \
		$(BIN)/python tokenize_scripts/tokenize_corpus.py --input $(DEMO)/split/$$part.jsonl \
			--tokenizer_path $(DEMO)/tokenizer.json --output $(DEMO)/$$part.safetensors || exit 1; \
	done
	rm -rf $(DEMO)/runs/demo
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 train_distributed.py \
		--train_path=$(DEMO)/train.safetensors --valid_path=$(DEMO)/validation.safetensors \
		--config_file=configs/tiny.json --tokenizer_path=$(DEMO)/tokenizer.json \
		--output_dir=$(DEMO)/runs --name=demo \
		--hybrid_numerator=1 --hybrid_denominator=2 --mixed_precision \
		--seq_length=128 --global_batch_size=32 --batch_reduction=1 \
		--learning_rate=2e-2 --warmup_proportion=0.05 --ema_decay=0.98 \
		--max_steps=500 --validate_every=125 --save_every=250
	$(BIN)/python -m gptbert.demo $(DEMO)/runs/demo --valid_path $(DEMO)/validation.safetensors

# What an exported folder does in transformers.
EXPORTED := export exported_masks exported_models adapters finetune

# Files in the order of their names: the longest have few tests, and xdist would begin with those that have most.
test: install
	$(MAKE) --jobs=2 lint $(OLDER:%=.venv/transformers-%)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	for version in $(OLDER); do \
		PYTHONPATH=.venv/transformers-$$version $(BIN)/python -m pytest -n 2 --dist loadfile \
			$(EXPORTED:%=tests/test_%.py) || exit 1; \
	done

# Beside the newest transformers: the oldest that exported folders promise to work with, whose Trainer imports datasets,
# and 5.0, since releases from 4.57 to 5.8 load models in other ways than both.
.venv/transformers-4.51: RELEASES := "transformers==4.51.3" "tokenizers~=0.21.0" "huggingface-hub~=0.30" "datasets~=3.5"
.venv/transformers-5.0: RELEASES := "transformers==5.0.0" "tokenizers~=0.22.0" "huggingface-hub~=1.3"
$(OLDER:%=.venv/transformers-%): .venv/.installed Makefile
	$(BIN)/$(PIP) --no-deps --upgrade --target $@ $(RELEASES)
	@touch $@

# What another PyTorch, or the Triton that it brings, may do otherwise.
TORCH_TESTS := torch_private compilation activation_checkpointing model trainer resume checkpoint export import_hf \
	generate evaluate fsdp lamb lamb_cpp lamb_optimizer lamb_shards lamb_launches cpp_mutants check span_mask \
	span_mask_operation masked_cross_entropy cross_entropy_rows cross_entropy_tolerance attention attention_context \
	bucket_sums add_bias depth_mix gated_norm dropout normalize muon optim layer_weighting samples likelihood inspect \
	world fresh_store upstream upstream_tokens linear recorded_step recorded_ranks flat_gradients fused_attention \
	fused_gated_norm fused_mixes fused_normalize bf16_kernels cross_entropy_launches mps recipes stand_in

# Beside the PyTorch of constraints.txt: any other, which brings its own Triton (a build for CUDA, some GB, on CPUs too).
# TORCH=2.11.0 is the oldest; TORCH=newest takes what pip finds.
test-torch: .venv/torch-$(TORCH)/.installed
	GPTBERT_TEST_ALL_CODE=1 .venv/torch-$(TORCH)/bin/python -m pytest -n 2 --dist loadfile $(TORCH_TESTS:%=tests/test_%.py)

# Triton 3.6, which PyTorch 2.11 brings, cannot interpret kernels with numpy 2.4.
.venv/torch-%/.installed: pyproject.toml setup.py
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/$(PIP) -e ".[dev]" $(if $(filter newest,$*),torch,"torch==$*") \
		$(if $(filter 2.11.%,$*),"numpy<2.4")
	@touch $@

# The GPU's own tests on a stand-in for one, by a PyTorch for CUDA: TORCH=2.11.0, say (tests/README.md). An hour.
test-stand-in: .venv/torch-$(TORCH)/.installed
	GPTBERT_TEST_DEVICE=cuda .venv/torch-$(TORCH)/bin/python -m tests.stand_in python -m pytest -n 2 tests/gpu

# The GPU's own tests. Without a GPU they are skipped; `make test` rehearses them on the CPU.
test-gpu: install
	GPTBERT_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/gpu -n 8 --dist worksteal

# What docs/faults.md promises.
FAULTS := faults hosts recipes resume fsdp skipping checkpoint manifest trackers records stop_signal skipped_steps fresh_store \
	one_rank word_checkpoints token_ids malicious fuzz stopping progress agreement

test-faults: install
	$(BIN)/python -m pytest -n 2 --dist loadfile $(FAULTS:%=tests/test_%.py)

# Files from elsewhere, damaged in other ways each time (100,000 of them; five minutes).
fuzz: install
	$(BIN)/python -m pytest -n 2 tests/test_malicious.py tests/test_fuzz.py --hypothesis-profile fuzz

# Eight processes for 2,000 steps: memory and open files stay, nothing is left behind.
soak: install
	$(BIN)/python -m pytest tests/soak.py -s

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Dockerfile, workflow and citation by their own linters.
lint-files: install
	$(BIN)/$(PIP) -e ".[lint]" -c constraints.txt
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# All pages as a site, in build/site; a link that leads nowhere is an error.
docs: install
	$(BIN)/$(PIP) -e ".[docs]" -c constraints.txt
	$(BIN)/mkdocs build --strict

# On a GPU, `pip install -e '.[bench]'` first adds the peers that need one. Passive, because OpenMP's threads otherwise
# spin while they wait for each other, and beside other work on the machine that makes many small steps look slow.
bench: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest benchmarks -rs --benchmark-enable --benchmark-columns=median,iqr,rounds
	$(BIN)/python -m benchmarks.bench_tokenize
	$(BIN)/python -m benchmarks.bench_train_step --save
	$(BIN)/python -m benchmarks.report

# Everything that a GPU can tell, in eight minutes, with a page in benchmarks/results. Peers stand beside it where pip finds them.
gpu: install
	$(BIN)/$(PIP) -e ".[bench]" || echo "without the peers of [bench]"
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf benchmarks/results/work $(DEMO) .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +
