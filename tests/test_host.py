"The host's memory: what `ftkit.memory.host` says, beside what the kernel counts while it happens"
import json, os, subprocess, sys, threading, time
from pathlib import Path
import pytest
from ftkit.core import FtkitError
from ftkit.memory import host

SHAPE = dict(model_type='llama', hidden_size=1024, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=8,
             num_key_value_heads=8, vocab_size=50_000, tie_word_embeddings=False, torch_dtype='bfloat16')

HEAD = """
import json, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from ftkit.models import PROMPTS, merge
from ftkit.mask import prompt_ids
folder,shape,method = Path(sys.argv[1]),json.loads(sys.argv[2]),sys.argv[3]
def begin():
    print('ready', flush=True)
    sys.stdin.readline()
"""

MAKE = HEAD + """
from tuned import make
model,tok = make(folder, shape, method, '5GB')
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained)
for p in trained: p.grad = torch.ones_like(p)
optimizer.step()
torch.save(optimizer.state_dict(), folder/'optimizer.pt')
sizes = [len(prompt_ids(tok, [dict(role='user', content=p)])) for p in PROMPTS]
print(json.dumps((sum(sizes) + len(sizes)*max(sizes))//2))
"""

MERGE = HEAD + """
LlamaForCausalLM(LlamaConfig(**shape | dict(hidden_size=32, vocab_size=32)))(torch.zeros(1, 4).long()) # imports
begin()
merge(folder/'tuned', folder/'merged', **({} if sys.argv[4] == 'compared' else dict(prompts=())))
"""

RESUME = HEAD + """
torch.load(folder/sys.argv[4], map_location='cpu', weights_only=True) # imports
begin()
states = torch.load(folder/'optimizer.pt', map_location='cpu', weights_only=True)
"""

def own_bytes(pid):
    "That no file could give back"
    try: lines = open(f'/proc/{pid}/status').read().split('\n')
    except (OSError, ProcessLookupError): return 0
    return 1024*next((int(line.split()[1]) for line in lines if line.startswith('RssAnon')), 0)

def grown(program, *args):
    "The most bytes that a program has, once it is ready, above what it had then; no heap keeps what is freed"
    run = subprocess.Popen([sys.executable, '-c', program, *map(str, args)], stdin=subprocess.PIPE, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env=os.environ | dict(MALLOC_MMAP_THRESHOLD_=str(2**19), OMP_NUM_THREADS='1'))
    while (line := run.stdout.readline()) != 'ready\n': assert line, run.stderr.read()[-1000:]
    drained = [threading.Thread(target=f.read) for f in (run.stdout, run.stderr)]
    for t in drained: t.start()
    before = most = own_bytes(run.pid)
    print('go', file=run.stdin, flush=True)
    while run.poll() is None:
        most = max(most, own_bytes(run.pid))
        time.sleep(.0005)
    assert run.returncode == 0
    return most - before

@pytest.fixture(scope='module', params=['lora', 'qlora'])
def made(request, tmp_path_factory):
    "(folder, method, tokens that predictions are compared on)"
    if not os.path.exists('/proc/self/status'): pytest.skip('nobody counts them here')
    folder = tmp_path_factory.mktemp(request.param)
    done = subprocess.run([sys.executable, '-c', MAKE, folder, json.dumps(SHAPE), request.param], capture_output=True,
                          text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-1000:]
    return folder, request.param, json.loads(done.stdout.split('\n')[-2])

@pytest.mark.parametrize('compared', [True, False])
def test_merging(made, compared):
    "To a tenth, and 20 MB of what is imported and of parts of a matrix"
    folder,method,tokens = made
    most = grown(MERGE, folder, json.dumps(SHAPE), method, 'compared' if compared else 'written')
    said = host(SHAPE, method, tokens=tokens*compared)['merging']
    print(f'{method}, {compared=}: {said/1e6:.0f} MB said, {most/1e6:.0f} measured')
    assert abs(most - said) < .1*said + 20e6

def test_resuming(made):
    "All that the optimizer keeps"
    folder,method,_ = made
    import torch
    torch.save(dict(state={0: dict(step=torch.ones(()))}), folder/'few.pt')
    most,said = grown(RESUME, folder, json.dumps(SHAPE), method, 'few.pt'),host(SHAPE, method)['resuming']
    assert abs(most - said) < .1*said + 5e6

@pytest.mark.parametrize('adapter', [None, 'lora'])
def test_saving_from_a_gpu(tmp_path, monkeypatch, adapter):
    "All tensors of a file are there at once; played on a CPU, where safetensors would copy none"
    import safetensors.torch as library
    from ftkit.models import load_model, load_tokenizer, save
    tok = load_tokenizer('embedded')
    model = load_model('embedded', tok, adapter)
    to_array,write,copies,most = library._to_ndarray,library.serialize_file,[],[]
    def copied(tensor):
        copies.append(tensor.clone()) # what `.to('cpu')` makes
        return to_array(copies[-1])
    def written(*args, **kwargs):
        most.append(sum(t.nbytes for t in copies))
        return write(*args, **kwargs)
    monkeypatch.setattr(library, '_to_ndarray', copied), monkeypatch.setattr(library, 'serialize_file', written)
    save(model, tok, tmp_path/'run')
    assert 0 <= most[0] - host(model.config, adapter or 'full')['saving'] <= 1024*bool(adapter) # rows of new tokens

def test_a_save_takes_nothing_of_a_gpu(tmp_path):
    "No tensor is made; but for experts, whose common matrices are taken apart: less than their gradients"
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig
    from peft import LoraConfig, get_peft_model
    from ftkit.meter import meter
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**small))
    config = Qwen3MoeConfig(**small, moe_intermediate_size=32, num_experts=4, head_dim=16, num_key_value_heads=2)
    experts = AutoModelForCausalLM.from_config(config)
    def taken(model):
        m = meter()
        for t in (*model.parameters(), *model.buffers()): m.add(t)
        m.phase = 'saving'
        with m: model.save_pretrained(tmp_path/'run')
        return sum(e.size for e in m.events if e.n > 0 and e.phase == 'saving')
    assert taken(dense) == 0 and taken(get_peft_model(dense, LoraConfig(target_modules="all-linear"))) == 0
    assert 0 < taken(experts) < sum(p.nbytes for p in experts.parameters())

def test_what_is_no_number():
    for tokens in (-1, 2.5, True, None):
        with pytest.raises(FtkitError, match='tokens'): host(SHAPE, tokens=tokens)
    assert 'merging' not in host(SHAPE, 'full') and host(SHAPE, tokens=0)['merging'] < host(SHAPE)['merging']
