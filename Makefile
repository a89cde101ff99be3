# Every run of the project. `make -n TARGET` prints the line behind a target, ready to be copied.
# A target can also be told which config file to read and any of its keys: CONFIG=... ARGS='section.key=value'.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.installed
RUN := $(VENV)/bin/python -m
SHARDS = $(if $(IN),'data.shards=[$(IN)]')
TESTSET = $(if $(IN),'shards=[$(IN)]')
FOLDER = $(if $(OUT),'out=$(OUT)')
# NPROC processes on each of NNODES machines; HEAD is host:port of the first, the same line runs on all.
NODES = $(if $(NNODES),--nnodes=$(NNODES) --rdzv-backend=c10d --rdzv-id=blip --rdzv-endpoint=$(or $(HEAD),\
	$(error NNODES needs HEAD=host:port of the first machine)),--standalone)
TRAIN = $(RUN) $(if $(NPROC)$(NNODES),torch.distributed.run $(NODES) --nproc-per-node=$(or $(NPROC),1) -m )

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-qformer test check bench world world-vqa world-classes shards vqa-shards pretrain captioner filter vqa language stage1 stage2-opt stage2-flant5 stage2-vqa chat features tiny-weights capfilt plan select report calibrate curves eval-retrieval eval-captions eval-vqa eval-zeroshot eval-filter results bootstrap ablation ablation-stage1 clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-17s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  variables: CONFIG IN OUT CAPTIONER FILTER MODEL IMAGE THRESHOLD FRACTION VERDICTS ROUNDS RUNS NPROC NNODES HEAD ARGS PYTHON'
	@echo "  make capfilt IN=shards OUT=runs/mine CAPTIONER=runs/captioner/model FILTER=runs/filter/model"
	@echo "  make select OUT=runs/mine THRESHOLD=0.5"
	@echo "  make pretrain CONFIG=configs/pretrain_14m_base.yaml NPROC=8 ARGS='train.accumulate=4'"

setup: $(READY)  ## make .venv with the locked packages; any other target does it when needed

$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'Python 3.11 or newer is needed and "$(PYTHON)" is not; try: make setup PYTHON=python3.11' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo 'installing the packages of requirements.lock into $(VENV): 7 GB, a few minutes'
	$(RUN) pip install --quiet -r requirements.lock
	@touch $@

demo: $(READY)  ## CapFilt from end to end on a generated corpus, on a CPU
	$(RUN) pipelines.demo $(or $(CONFIG),configs/tiny/demo.yaml) $(FOLDER) $(ARGS)

demo-qformer: $(READY)  ## BLIP-2 on the generated corpus: both stages, captions and answers of an OPT and a FlanT5
	$(RUN) pipelines.demo_qformer $(or $(CONFIG),configs/tiny/demo_qformer.yaml) $(FOLDER) $(ARGS)

test: $(READY)  ## all tests; ARGS='-k select' for some
	OMP_NUM_THREADS=1 $(RUN) pytest -q $(ARGS)

check: $(READY)  ## lint, format and types
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

bench: $(READY)  ## measure on this machine: captions and scores beside transformers, Ray beside plain processes
	$(RUN) pipelines.bench $(or $(CONFIG),configs/bench.yaml) $(FOLDER) $(ARGS)

world: $(READY)  ## draw the generated corpus: noisy, clean and test shards with their truth
	$(RUN) pipelines.world $(or $(CONFIG),configs/tiny/world.yaml) $(FOLDER) $(ARGS)
	$(if $(CONFIG)$(FOLDER)$(ARGS),,$(RUN) pipelines.world configs/tiny/world_brief.yaml)

world-vqa: $(READY)  ## questions about the generated corpus, answered from its truth
	$(RUN) pipelines.world_questions $(or $(CONFIG),configs/tiny/world_questions.yaml) $(FOLDER) $(ARGS)

world-classes: $(READY)  ## single shapes of the generated corpus, a folder for each class
	$(RUN) pipelines.world_classes $(or $(CONFIG),configs/tiny/world_classes.yaml) $(FOLDER) $(ARGS)

shards: $(READY)  ## clean shards from COCO, Flickr30k, NoCaps, a folder or a table: CONFIG=configs/ingest_coco.yaml
	$(RUN) pipelines.ingest $(or $(CONFIG),configs/ingest_folder.yaml) $(FOLDER) $(ARGS)

vqa-shards: $(READY)  ## shards of questions from VQAv2, OK-VQA, Visual Genome: CONFIG=configs/ingest_vqa.yaml
	$(RUN) pipelines.ingest_vqa $(or $(CONFIG),configs/ingest_vqa.yaml) $(FOLDER) $(ARGS)

pretrain: $(READY)  ## train a MED: ITC + ITM + LM; tiny, unless CONFIG is configs/pretrain_14m_base.yaml or your own
	$(TRAIN)pipelines.train_blip $(or $(CONFIG),configs/tiny/pretrain.yaml) $(SHARDS) $(FOLDER) $(ARGS)

captioner: $(READY)  ## fine-tune a captioner: LM; tiny, unless CONFIG is configs/captioner_coco.yaml or your own
	$(TRAIN)pipelines.train_blip $(or $(CONFIG),configs/tiny/captioner.yaml) $(SHARDS) $(FOLDER) $(ARGS)

filter: $(READY)  ## fine-tune a filter: ITC + ITM; tiny, unless CONFIG is configs/filter_coco.yaml or your own
	$(TRAIN)pipelines.train_blip $(or $(CONFIG),configs/tiny/filter.yaml) $(SHARDS) $(FOLDER) $(ARGS)

vqa: $(READY)  ## fine-tune for visual question answering; tiny, unless CONFIG is configs/vqa.yaml or your own
	$(TRAIN)pipelines.train_vqa $(or $(CONFIG),configs/tiny/vqa.yaml) $(SHARDS) $(FOLDER) $(ARGS)

language: $(READY)  ## pre-train a tiny language model on texts of the generated corpus, for stage 2 to freeze
	$(RUN) pipelines.train_language $(or $(CONFIG),configs/tiny/language_opt.yaml) $(FOLDER) $(ARGS)

stage1: $(READY)  ## BLIP-2, Q-Former beside a frozen ViT: ITC + ITM + ITG; tiny, unless CONFIG is configs/stage1.yaml
	$(TRAIN)pipelines.train_stage1 $(or $(CONFIG),configs/tiny/stage1.yaml) $(SHARDS) $(FOLDER) $(ARGS)

stage2-opt: $(READY)  ## BLIP-2, Q-Former into a frozen OPT; tiny, unless CONFIG is configs/stage2_opt.yaml
	$(TRAIN)pipelines.train_stage2 $(or $(CONFIG),configs/tiny/stage2_opt.yaml) $(SHARDS) $(FOLDER) $(ARGS)

stage2-flant5: $(READY)  ## BLIP-2, Q-Former into a frozen FlanT5; tiny, unless CONFIG is configs/stage2_flant5.yaml
	$(TRAIN)pipelines.train_stage2 $(or $(CONFIG),configs/tiny/stage2_flant5.yaml) $(SHARDS) $(FOLDER) $(ARGS)

chat: needs-MODEL needs-IMAGE $(READY)  ## questions about IMAGE on the keyboard, answers of MODEL, a stage 2 of BLIP-2
	$(RUN) pipelines.chat $(or $(CONFIG),configs/chat.yaml) 'model=$(MODEL)' 'image=$(IMAGE)' $(ARGS)

features: $(READY)  ## keep the tokens of a frozen ViT for stages 1 and 2; tiny, unless CONFIG is configs/features.yaml
	$(TRAIN)pipelines.cache_features $(or $(CONFIG),configs/tiny/features.yaml) $(TESTSET) $(FOLDER) $(ARGS)

stage2-vqa: $(READY)  ## BLIP-2, visual question answering, the question in the Q-Former too; tiny, unless CONFIG says
	$(TRAIN)pipelines.train_stage2_vqa $(or $(CONFIG),configs/tiny/stage2_vqa.yaml) $(SHARDS) $(FOLDER) $(ARGS)

tiny-weights: $(READY)  ## train the captioner and the filter of weights/tiny again, from the corpus on
	$(RUN) pipelines.world configs/tiny/world.yaml
	$(RUN) pipelines.world configs/tiny/world_brief.yaml
	$(RUN) pipelines.train_blip configs/tiny/pretrain.yaml
	$(RUN) pipelines.train_blip configs/tiny/captioner.yaml
	$(RUN) pipelines.train_blip configs/tiny/filter.yaml
	$(RUN) pipelines.publish configs/tiny/publish.yaml

capfilt: needs-IN needs-OUT needs-CAPTIONER needs-FILTER $(READY)  ## caption and score the shards of IN into OUT
	$(RUN) pipelines.run_capfilt $(or $(CONFIG),configs/capfilt.yaml) 'input=$(IN)' 'out=$(OUT)' \
		'capfilt.captioner=$(CAPTIONER)' 'capfilt.filter=$(FILTER)' $(ARGS)

plan: needs-IN $(READY)  ## hours and cost of capfilt over IN with 1, 8, 64 workers, from a measured sample: ARGS=price=2.5
	$(RUN) pipelines.plan $(or $(CONFIG),configs/plan.yaml) 'input=$(IN)' $(FOLDER) \
		$(if $(CAPTIONER),'captioner=$(CAPTIONER)') $(if $(FILTER),'filter=$(FILTER)') $(ARGS)

select: needs-OUT $(READY)  ## keep the texts of OUT that score THRESHOLD (0.5), or the best FRACTION of them
	$(RUN) pipelines.select $(or $(CONFIG),configs/select.yaml) 'out=$(OUT)' \
		$(if $(THRESHOLD),threshold=$(THRESHOLD)) $(if $(FRACTION),fraction=$(FRACTION)) $(ARGS)

report: needs-OUT $(READY)  ## a page to look at, OUT/report.html: examples, scores, a slider for the threshold
	$(RUN) pipelines.report $(or $(CONFIG),configs/report.yaml) 'out=$(OUT)' \
		$(if $(THRESHOLD),threshold=$(THRESHOLD)) $(ARGS)

calibrate: needs-OUT $(READY)  ## the threshold for a wanted precision, from labelled rows of OUT: VERDICTS=verdicts.json
	$(RUN) pipelines.calibrate $(or $(CONFIG),configs/calibrate.yaml) 'out=$(OUT)' \
		$(if $(VERDICTS),'verdicts=$(VERDICTS)') $(ARGS)

curves: $(READY)  ## the learning curves of runs side by side: ARGS='runs=[runs/a,runs/b]'
	$(RUN) pipelines.curves $(or $(CONFIG),configs/curves.yaml) $(ARGS)

eval-retrieval: $(READY)  ## TR@k and IR@k of MODEL on clean shards; tiny, unless CONFIG is configs/eval_retrieval_coco.yaml
	$(TRAIN)pipelines.eval_retrieval $(or $(CONFIG),configs/tiny/eval_retrieval.yaml) \
		$(if $(MODEL),'model=$(MODEL)') $(TESTSET) $(FOLDER) $(ARGS)

eval-captions: $(READY)  ## BLEU, ROUGE-L, CIDEr-D of MODEL on clean shards; tiny, unless CONFIG is configs/eval_captions_coco.yaml
	$(TRAIN)pipelines.eval_captions $(or $(CONFIG),configs/tiny/eval_captions.yaml) \
		$(if $(MODEL),'model=$(MODEL)') $(TESTSET) $(FOLDER) $(ARGS)

eval-vqa: $(READY)  ## VQA accuracy of MODEL on shards of questions, answers.json for the server; tiny, unless CONFIG says
	$(TRAIN)pipelines.eval_vqa $(or $(CONFIG),configs/tiny/eval_vqa.yaml) \
		$(if $(MODEL),'model=$(MODEL)') $(TESTSET) $(FOLDER) $(ARGS)

eval-zeroshot: $(READY)  ## zero-shot classes, shifts and a linear probe of MODEL on labelled images; tiny, unless CONFIG says
	$(TRAIN)pipelines.eval_zeroshot $(or $(CONFIG),configs/tiny/eval_zeroshot.yaml) \
		$(if $(MODEL),'model=$(MODEL)') $(if $(IN),'sets={test: {images: $(IN)}}' probe.train=null) $(FOLDER) $(ARGS)

eval-filter: $(READY)  ## precision of MODEL as a filter on clean shards
	$(RUN) pipelines.eval_filter $(or $(CONFIG),configs/tiny/eval_filter.yaml) \
		$(if $(MODEL),'model=$(MODEL)') $(TESTSET) $(FOLDER) $(ARGS)

results: $(READY)  ## evaluations beside the papers, recall curves, a gallery of examples: RUNS='[runs/a,runs/b]'
	$(RUN) pipelines.results $(or $(CONFIG),configs/results.yaml) $(if $(RUNS),'runs=$(RUNS)') $(FOLDER) $(ARGS)

bootstrap: $(READY)  ## the whole loop, ROUNDS of it: captioner, filter, clean corpus, new MED; tiny unless CONFIG says
	$(RUN) pipelines.bootstrap $(or $(CONFIG),configs/tiny/bootstrap.yaml) $(if $(ROUNDS),rounds=$(ROUNDS)) \
		$(if $(NPROC),processes=$(NPROC)) $(FOLDER) $(ARGS)

ablation: $(READY)  ## BLIP's Table 1 over several seeds: raw, filtered, captioned, both; tiny unless CONFIG says
	$(RUN) pipelines.ablation $(or $(CONFIG),configs/tiny/ablation.yaml) $(if $(NPROC),processes=$(NPROC)) $(FOLDER) $(ARGS)

ablation-stage1: $(READY)  ## what stage 1 is worth to stage 2, BLIP-2's figure 5, over several seeds; tiny unless CONFIG says
	$(RUN) pipelines.ablation_stage1 $(or $(CONFIG),configs/tiny/ablation_stage1.yaml) $(FOLDER) $(ARGS)

clean:  ## remove what the demo and the tools left; your runs and .venv stay
	rm -rf runs/demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find blip capfilt qformer pipelines tests -name __pycache__ -prune -exec rm -rf {} +

# Before anything is installed or loaded: stop, in one line and with status 2, where a variable is not given.
needs-%:
	$(if $($*),,$(error make $(MAKECMDGOALS) needs $*=...; `make help` shows an example))
