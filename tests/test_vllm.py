"vLLM beside the model that is trained, in this process and as a server; `make vllm` runs it on a CPU"
import os, signal, socket
import pytest, torch
from ftkit.core import FtkitError
from ftkit.models import load_model, load_tokenizer
from ftkit.rl import rl
from ftkit.rollout import HFEngine, VLLMEngine, VLLMServer, next_logps, sample
from ftkit.tasks import rows

pytest.importorskip('vllm')
os.environ |= dict(VLLM_CPU_KVCACHE_SPACE='1', VLLM_NO_USAGE_STATS='1', VLLM_LOGGING_LEVEL='ERROR')
ROWS = [dict(prompt=r['messages'][0]['content']) for r in rows(40)]
QUESTIONS = [r['prompt'] for r in ROWS[:6]]

def start(kind):
    "A model whose adapter vLLM can hold, or one with trained tokens, which it cannot"
    tok = load_tokenizer('embedded')
    more = dict(trainable_token_indices=None) if kind == 'adapter' else {}
    model = load_model('embedded', tok, precision='fp32', **more)
    move(model)
    return model, tok

def move(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for n,p in model.named_parameters():
            if p.requires_grad: p.add_(torch.randn_like(p)*.05)

def port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='module', params=['colocate adapter', 'colocate weights', 'server adapter', 'server weights'])
def pair(request):
    "(engine, model, tokenizer)"
    where,kind = request.param.split()
    model,tok = start(kind)
    made = VLLMEngine(model, tok, max_length=256, enforce_eager=True) if where == 'colocate' else \
        VLLMServer(model, tok, max_length=256, port=port(), flags=['--enforce-eager'])
    assert made.at.adapter == (kind == 'adapter')
    yield made, model, tok
    made.close()

def far(engine, model, questions):
    "Largest distance of a log-probability of the likeliest next tokens"
    now = next_logps(model, questions)
    return max(abs(now[i, t].item()-x) for i,said in enumerate(engine.next_tokens(questions)) for t,x in said.items())

def test_the_likeliest_answers_are_transformers(pair):
    engine,model,tok = pair
    ours,theirs = (sample(e, tok, QUESTIONS, 2, 16, temperature=0) for e in (HFEngine(model, tok), engine))
    for a,b in zip(sum(ours, []), sum(theirs, [])):
        assert a.ids == b.ids and a.stopped == b.stopped
        torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), atol=2e-5, rtol=1e-5)

@pytest.mark.parametrize('temperature', [1., .7])
def test_log_probabilities_are_those_it_was_drawn_with(pair, temperature):
    engine,model,tok = pair
    groups = sample(engine, tok, QUESTIONS, 4, 16, temperature, seed=3)
    assert len({tuple(r.ids) for g in groups for r in g}) > 12
    for r in sum(groups, []):
        ids = torch.tensor([r.prompt_ids + r.ids], device=model.device)
        with torch.no_grad(): logits = model(input_ids=ids).logits[0]
        said = (logits[len(r.prompt_ids)-1:-1].float()/temperature).log_softmax(-1)[range(len(r.ids)), r.ids].cpu()
        torch.testing.assert_close(torch.tensor(r.logps), said, atol=2e-5, rtol=1e-5)
    assert groups == sample(engine, tok, QUESTIONS, 4, 16, temperature, seed=3)

def test_weights_arrive(pair):
    "Before `sync` it says what it said; after it, what the model says now"
    engine,model,tok = pair
    asked = [r[0].prompt_ids for r in sample(HFEngine(model, tok), tok, QUESTIONS[:2], 1, 1)]
    for step in (1, 2):
        move(model, step)
        assert far(engine, model, asked) > .01
        engine.sync(step)
        assert far(engine, model, asked) < 2e-5

def vowels(completions, **_): return [sum(c in 'aeiou' for c in text)/(len(text)+1) for text in completions]

def test_it_trains(pair, tmp_path, recwarn):
    "Every sync is verified on the way; nothing is found"
    engine,model,tok = pair
    run = rl(model, tok, ROWS, vowels, 'grpo', tmp_path/'run', engine, steps=4, prompts_per_step=4, group=4,
             max_new_tokens=16, learning_rate=1e-3)
    assert not [e for e in run.log if 'engine' in e] and all(e['sampler_gap'] < 2e-5 for e in run.log)
    assert run.log[-1]['grad_norm'] > 0

def test_stale_weights_are_found(pair, tmp_path, monkeypatch):
    engine,model,tok = pair
    monkeypatch.setattr(engine, 'sync', lambda step: None)
    with pytest.raises(FtkitError, match='stale weights'): rl(
        model, tok, ROWS, vowels, 'grpo', tmp_path/'run', engine, steps=3, prompts_per_step=4, group=4,
        max_new_tokens=16, learning_rate=1e-2)

def test_only_its_own_server_is_stopped(pair):
    "A second one at the same address is a guest: closing it leaves the server as it was"
    engine,model,tok = pair
    if not isinstance(engine, VLLMServer): pytest.skip('a server only')
    guest = VLLMServer(model, tok, url=engine.url)
    guest.close()
    assert engine.process.poll() is None
    engine.sync(9)
    assert len(sample(engine, tok, QUESTIONS[:1], 1, 4)) == 1

def test_a_server_that_does_not_answer_is_named(pair):
    engine,model,tok = pair
    if not isinstance(engine, VLLMServer): pytest.skip('a server only')
    before,engine.timeout = engine.timeout,1
    os.killpg(engine.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(FtkitError, match='failed 2 times: ReadTimeout'): engine.sample([[5]], 1, 4)
    finally:
        os.killpg(engine.process.pid, signal.SIGCONT)
        engine.timeout = before

def test_no_server_is_named():
    with pytest.raises(FtkitError, match='no vLLM server at'): VLLMServer(
        *start('adapter'), url=f'http://127.0.0.1:{port()}', timeout=1)
