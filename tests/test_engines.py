"""Other engines, each in an environment of its own: what they train loads here, and what we merge stops there

    FTKIT_UNSLOTH_PYTHON=... FTKIT_VLLM_PYTHON=... pytest tests/test_engines.py -s

name the interpreters of environments with unsloth and with vllm (and this checkout's dependencies).
"""
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from ftkit.models import load_model, load_tokenizer, load_tuned, merge, save
from test_adapters import KINDS, answer, batch, learn
from test_merge import base_folder

ROOT = Path(__file__).resolve().parents[1]

def run_in(name, code, *args):
    "Run code in the environment that a variable names; its last line"
    python = os.environ.get(name)
    if not python: pytest.skip(f'{name} names no interpreter')
    offline = dict(PYTHONPATH=f'{ROOT}:{ROOT/"tests"}', HF_HUB_OFFLINE='1', VLLM_CPU_KVCACHE_SPACE='1',
                   VLLM_ENABLE_V1_MULTIPROCESSING='0', VLLM_NO_USAGE_STATS='1')
    command = [python, '-c', code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().split('\n')[-1]

UNSLOTH = """
import sys
from pathlib import Path
folder,adapter = Path(sys.argv[1]),sys.argv[2]
import ftkit.chat, ftkit.lora, ftkit.mask, ftkit.models
assert 'unsloth' not in sys.modules, 'nobody asked for it'
import torch
from ftkit.mask import encode
from ftkit.models import load_model, load_tokenizer, save
tok = load_tokenizer(folder/'base')
model = load_model(folder/'base', tok, adapter, 'fp32', engine='unsloth', r=4)
row = encode(tok, [dict(role='user', content='What is 2 + 2?'), dict(role='assistant', content='4')])
batch = {c: torch.tensor([v, v]) for c,v in row.items()}
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
for _ in range(60):
    model.train()(**batch).loss.backward()
    optimizer.step(), optimizer.zero_grad()
save(model, tok, folder/'tuned')
with torch.no_grad(): torch.save(model.eval()(input_ids=batch['input_ids']).logits.float(), folder/'logits.pt')
"""

@pytest.mark.parametrize('adapter', ['lora', 'qlora'])
def test_what_unsloth_trains_loads_here_and_merges(tmp_path, adapter):
    tok = load_tokenizer(base_folder(tmp_path/'base', template='chatml'))
    run_in('FTKIT_UNSLOTH_PYTHON', UNSLOTH, tmp_path, adapter)
    tok,model = load_tuned(tmp_path/'tuned')
    with torch.no_grad(): ours = model(input_ids=batch(tok)['input_ids']).logits
    print(f"largest difference of a logit: {(ours-torch.load(tmp_path/'logits.pt')).abs().max():.2g}")
    torch.testing.assert_close(ours, torch.load(tmp_path/'logits.pt'), atol=1e-5, rtol=0)
    assert answer(model, tok) == ('4', True)
    merge(tmp_path/'tuned', tmp_path/'merged')
    assert answer(load_tuned(tmp_path/'merged')[1], tok) == ('4', True)

VLLM = """
import json, sys
from vllm import LLM, SamplingParams
prompt = json.load(open(sys.argv[1]+'/prompt.json'))
llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=256, dtype='bfloat16')
out = llm.chat(prompt['messages'], SamplingParams(temperature=0, max_tokens=20))[0]
said = out.outputs[0]
print(json.dumps([said.text, said.finish_reason, list(out.prompt_token_ids) == prompt['input_ids']]))
"""

@pytest.mark.parametrize('kind', ['lora', 'dora', 'qlora'])
def test_a_merged_model_stops_in_vllm_and_reads_the_same_prompt(tmp_path, kind):
    base = base_folder(tmp_path/'base', heads=2)
    tok = load_tokenizer(base)
    model = learn(load_model(base, tok, **dict(adapter='lora', r=4) | KINDS[kind], precision='bf16'), tok)
    save(model, tok, tmp_path/'tuned')
    merge(tmp_path/'tuned', tmp_path/'merged')
    assert json.loads(run_in('FTKIT_VLLM_PYTHON', VLLM, tmp_path/'merged')) == ['4', 'stop', True]

def test_nothing_is_imported_that_was_not_asked_for():
    code = """if True:
        import sys
        from ftkit.models import load_model, load_tokenizer
        load_model('embedded', load_tokenizer('embedded'))
        print(sorted({'unsloth', 'vllm', 'trl', 'bitsandbytes'} & {*sys.modules}))"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().split('\n')[-1] in ("[]", "['bitsandbytes']"), done.stdout # PEFT imports bitsandbytes
