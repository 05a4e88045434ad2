"Engines with weights of their own: what is wrong with them is found, and called by its name"
import copy, http.server, json, os, subprocess, sys, threading, time, warnings
from pathlib import Path
import httpx, pytest, torch
from ftkit.core import FtkitError
from ftkit.models import load_model, load_tokenizer
from ftkit.rl import rl
from ftkit.rollout import HFEngine, Rollout, VLLMServer, _Follower, _tail, sample
from ftkit.tasks import rows

ROWS = [dict(prompt=r['messages'][0]['content']) for r in rows(40)]
QUICK = dict(steps=4, prompts_per_step=6, group=6, max_new_tokens=16, learning_rate=2e-3, save_steps=100)

def vowels(completions, **_): return [sum(c in 'aeiou' for c in text)/(len(text)+1) for text in completions]

@pytest.fixture
def model():
    tok = load_tokenizer('embedded')
    return load_model('embedded', tok), tok

class Apart(HFEngine):
    "A copy of the model, with knobs"
    def __init__(self, model, tok, stale=False, noise=0., top_p=1., again=False, late=0., deaf=0, own=False):
        super().__init__(copy.deepcopy(model), tok)
        self.theirs,self.tok,self.synced = model,tok,0
        self.stale,self.noise,self.top_p,self.again,self.late,self.deaf,self.own = stale,noise,top_p,again,late,deaf,own

    def sync(self, step):
        self.synced += 1
        if self.stale or self.deaf > 0 < step:
            self.deaf -= 1
            return
        self.model.load_state_dict(self.theirs.state_dict())
        torch.manual_seed(0)
        with torch.no_grad():
            for p in self.model.parameters(): p.add_(torch.randn_like(p)*self.noise)

    def kept(self, r):
        "Log-probabilities of what is left of the distributions, as some engines say them"
        with torch.no_grad(): logits = self.model(input_ids=torch.tensor([r.prompt_ids + r.ids])).logits[0]
        p = _tail(logits[len(r.prompt_ids)-1:-1].softmax(-1), self.top_p, 0)
        return (p/p.sum(-1, keepdim=True))[range(len(r.ids)), r.ids].log().tolist()

    def sample(self, prompts, n, max_new_tokens, temperature, top_p, top_k, seed):
        time.sleep(self.late)
        found = super().sample(prompts, n, max_new_tokens, temperature, self.top_p, top_k, seed)
        if self.own: found = [[r._replace(logps=self.kept(r)) for r in g] for g in found]
        if not self.again: return found
        def twice(r):
            ids = self.tok(' ' + self.tok.decode(r.ids), add_special_tokens=False).input_ids
            return r._replace(ids=(ids + r.ids)[:len(r.ids)]) if self.again == 'padded' else r._replace(ids=ids)
        return [[twice(r) for r in g] for g in found]

def findings(model, tok, out, engine=Apart, algorithm='grpo', **knobs):
    "What a run with such an engine says: kinds of findings, each once, and those in its log"
    options = {k: knobs.pop(k) for k in ('engine_timeout', 'epochs', 'minibatches', 'group') if k in knobs}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        run = rl(model, tok, ROWS, vowels, algorithm, out, engine(model, tok, **knobs), **QUICK | options)
    said = [str(w.message).split(': ')[1] for w in caught if str(w.message).startswith(engine.__name__)]
    assert len(said) == len({*said}), 'each kind is said once'
    return {*said}, {e['engine'].split(':')[0] for e in run.log if 'engine' in e}

class Mute(Apart):
    "It does not say the next tokens, so that its answers alone can tell"
    next_tokens = None
    def __getattribute__(self, name):
        if name == 'next_tokens': raise AttributeError(name)
        return super().__getattribute__(name)

@pytest.mark.parametrize('algorithm,more', [
    ('grpo', dict(epochs=2)), ('grpo', dict(minibatches=2)), ('ppo', dict(group=6))])
@pytest.mark.parametrize('knobs,kind', [
    (dict(), None), (dict(top_p=.7), 'a cut tail'), (dict(again='padded'), 'another text')])
def test_an_engine_is_found_out_with_several_updates(model, tmp_path, algorithm, more, knobs, kind):
    expected = {kind} if kind else set()
    said,logged = findings(*model, tmp_path/'run', algorithm=algorithm, **knobs, **more)
    assert said == logged == expected

def test_noise_is_called_so_by_the_answers_alone(model, tmp_path):
    assert findings(*model, tmp_path/'run', engine=Mute, noise=.03)[0] == {'another arithmetic'}

def test_an_engine_that_knows_the_trainer_is_not_its_own(model, tmp_path):
    net,tok = model
    other = HFEngine(copy.deepcopy(net), tok)
    class Keeps:
        model = net # and samples from another one
        def sync(self, step): pass
        def sample(self, *args): return other.sample(*args)
    run = rl(*model, ROWS, vowels, 'grpo', tmp_path/'run', Keeps(), **QUICK | dict(steps=1))
    assert json.loads((run.path/'run.json').read_text())['options']['correction'] == 'token_truncate'

@pytest.mark.parametrize('knobs,kind', [
    (dict(), None), (dict(late=.01, engine_timeout=60.), None), (dict(noise=.02), 'another arithmetic'),
    (dict(top_p=.7), 'a cut tail'), (dict(top_p=.7, own=True), 'a cut tail'), (dict(again='padded'), 'another text')])
def test_an_engine_is_found_out(model, tmp_path, knobs, kind):
    expected = {kind} if kind else set()
    said,logged = findings(*model, tmp_path/'run', **knobs)
    assert said == logged == expected

def test_stale_weights_stop_a_run(model, tmp_path):
    with pytest.raises(FtkitError, match='step 1: stale weights'): findings(*model, tmp_path/'run', stale=True)

def test_weights_that_did_not_arrive_are_handed_over_again(model, tmp_path):
    assert findings(*model, tmp_path/'run', deaf=1) == (set(), set())

@pytest.mark.parametrize('knobs,message', [
    (dict(late=2., engine_timeout=.3), 'Apart has not answered in 0.3 s'),
    (dict(again=True), 'was its text tokenised again')])
def test_what_cannot_be_used_stops_a_run(model, tmp_path, knobs, message):
    with pytest.raises(FtkitError, match=message): findings(*model, tmp_path/'run', **knobs)

def test_a_late_error_is_the_engines_own(model):
    class Broken(Apart):
        def sample(self, *args): raise ConnectionError('gone')
    with pytest.raises(ConnectionError, match='gone'): sample(Broken(*model), model[1], ['Hi'], timeout=60)

@pytest.mark.parametrize('wrong,message', [
    (lambda r: r._replace(prompt_ids=[5]), 'another prompt'), (lambda r: r._replace(ids=[], logps=[]), '0 tokens'),
    (lambda r: r._replace(logps=r.logps[1:]), 'tokenised again')])
def test_answers_that_are_none(model, wrong, message):
    class Odd(HFEngine):
        def sample(self, *args): return [[wrong(r) for r in g] for g in super().sample(*args)]
    with pytest.raises(FtkitError, match=message): sample(Odd(*model), model[1], ['Hi', 'Who?'], n=2, max_new_tokens=4)

def test_an_engine_of_other_weights_is_corrected(model, tmp_path):
    "A copy with noise: 'token_truncate' by default, none on request, and the run's own model needs none"
    for more,expected in ((dict(), 'token_truncate'), (dict(correction='none'), 'none'),
                          (dict(correction='sequence_mask'), 'sequence_mask')):
        run = rl(*model, ROWS, vowels, 'grpo', tmp_path/expected, Apart(*model), **QUICK | dict(steps=1), **more)
        assert json.loads((run.path/'run.json').read_text())['options']['correction'] == expected
    run = rl(*model, ROWS, vowels, 'grpo', tmp_path/'own', **QUICK | dict(steps=1))
    assert json.loads((run.path/'run.json').read_text())['options']['correction'] is None
    assert run.log[0]['sampler_gap'] < 1e-4

class Scripted(http.server.BaseHTTPRequestHandler):
    "An OpenAI-compatible server that says what it is told to: a list of (status, seconds to wait)"
    script,seen = [],[]
    def do_GET(self): self.say(200, {})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.seen.append((self.path.rsplit('/', 1)[-1], body))
        status,late = self.script.pop(0) if self.script and 'completions' in self.path else (200, 0)
        time.sleep(late)
        logprobs = dict(token_logprobs=[-.5], top_logprobs=[{'token_id:7': -.5}])
        self.say(status, dict(choices=[dict(index=0, token_ids=[7], logprobs=logprobs)]))
    def say(self, status, body):
        self.send_response(status)
        self.end_headers()
        try: self.wfile.write(json.dumps(body).encode())
        except BrokenPipeError: pass
    def log_message(self, *args): pass

@pytest.fixture
def server():
    Scripted.script,Scripted.seen = [],[]
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Scripted) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{made.server_port}'
        made.shutdown()

@pytest.mark.parametrize('script,message', [
    ([], None), ([(503, 0)], None), ([(200, 2)], None), ([(503, 0)]*2, 'failed 2 times'),
    ([(200, 2)]*2, 'failed 2 times: ReadTimeout'), ([(404, 0)], 'refuses v1/completions')])
def test_a_server_is_asked_again_and_then_named(model, server, script, message):
    made = VLLMServer(*model, url=server)
    made.timeout,Scripted.script = .5,list(script)
    if message:
        with pytest.raises(FtkitError, match=message): made.sample([[5, 6]], 1, 4)
    else: assert made.sample([[5, 6]], 1, 4) == [[Rollout([5, 6], [7], [-.5], False)]]

def test_a_load_that_was_late_is_not_lost(model, server, monkeypatch):
    "Asked again, the server has it already"
    tok = load_tokenizer('embedded')
    made = VLLMServer(load_model('embedded', tok, trainable_token_indices=None), tok, url=server)
    calls,post = [],httpx.post
    def late(url, **kwargs):
        calls.append(url)
        if '/load_lora' not in url: return post(url, **kwargs)
        if len(calls) == 1: raise httpx.ReadTimeout('late')
        return httpx.Response(400, text='The lora adapter has already been loaded')
    monkeypatch.setattr(httpx, 'post', late)
    made.sync(1)
    assert len(calls) >= 2

def test_a_long_prompt_is_refused_before_it_is_sent(model, server):
    made = VLLMServer(*model, url=server, max_length=20)
    with pytest.raises(FtkitError, match='more than the 20'): sample(made, model[1], ['The opposite of hot?'], 1, 15)

def test_a_busy_port_is_no_server_of_ours(model, tmp_path, monkeypatch, server):
    "Nor is one that ends before it answers"
    from ftkit import rollout
    with pytest.raises(FtkitError, match='is taken'): VLLMServer(*model, port=int(server.rsplit(':', 1)[1]))
    monkeypatch.setattr(rollout, '_serve', lambda *args: subprocess.Popen(
        [sys.executable, '-c', 'import sys; sys.exit(3)'], start_new_session=True))
    (tmp_path/'server.log').touch()
    monkeypatch.setattr(Path, 'read_text', lambda self: 'no memory')
    with pytest.raises(FtkitError, match='the vLLM server ended with 3: no memory'): VLLMServer(*model, timeout=20)

def test_children_are_stopped_with_a_leader_that_is_dead(tmp_path):
    from ftkit.rollout import _stop
    code = ("import os, subprocess, sys; p = subprocess.Popen(['sleep', '60']); "
            "open(sys.argv[1], 'w').write(str(p.pid)); os._exit(0)")
    leader = subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'pid')], start_new_session=True)
    leader.wait()
    child = int((tmp_path/'pid').read_text())
    os.kill(child, 0)
    _stop(leader)
    time.sleep(.2)
    state = Path(f'/proc/{child}/stat')
    assert not state.exists() or state.read_text().split()[2] == 'Z'

def test_an_adapter_by_another_name_and_a_model_without_one(tmp_path):
    "What vLLM stands on is the base, and what it gets is the adapter in use"
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    tok = load_tokenizer('embedded')
    two = load_model('embedded', tok, trainable_token_indices=None)
    two.add_adapter('other', LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM'))
    two.set_adapter('other')
    follower = _Follower(two, tok)
    saved = load_file(f'{follower.write(1)[1]}/adapter_model.safetensors')
    assert follower.adapter and {min(w.shape) for w in saved.values()} == {4}
    plain = get_peft_model(load_model('embedded', tok, adapter=None), LoraConfig(r=4, target_modules='all-linear'))
    del plain.get_base_model().ftkit
    assert not _Follower(plain, tok).adapter
    assert _Follower(plain, tok, '/some/where').path == '/some/where'
    with pytest.raises(FtkitError, match='more than a plain adapter'): _Follower(
        load_model('embedded', tok), tok, '/nowhere')

def test_names_of_weights_are_never_used_twice(server):
    tok = load_tokenizer('embedded')
    adapted = load_model('embedded', tok, trainable_token_indices=None)
    made = [VLLMServer(adapted, tok, url=server) for _ in range(2)]
    for engine in made:
        for step in (1, 1): engine.sync(step)
    loaded = [b['lora_name'] for p,b in Scripted.seen if p == 'load_lora_adapter']
    unloaded = [b['lora_name'] for p,b in Scripted.seen if p == 'unload_lora_adapter']
    assert len(loaded) == len({*loaded}) == 6
    assert {*loaded} - {*unloaded} == {e.name for e in made}
    made[0].sample([[5]], 1, 4)
    assert Scripted.seen[-1][1]['model'] == made[0].name

def test_what_an_adapter_cannot_carry_is_written_whole():
    "Trained tokens and whole models; what is written computes what the model computes"
    from transformers import AutoModelForCausalLM
    tok,ids = load_tokenizer('embedded'),torch.tensor([[30, 40, 50]])
    for options,adapter in ((dict(trainable_token_indices=None), True), (dict(), False), (dict(adapter='full'), False)):
        trained = load_model('embedded', tok, **options).eval()
        with torch.no_grad():
            for p in trained.parameters():
                if p.requires_grad: p.add_(torch.randn_like(p)*.02)
        follower = _Follower(trained, tok)
        assert follower.adapter == adapter
        name,folder = follower.write(3)
        if adapter: continue
        with torch.no_grad(): torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits, trained(ids).logits, atol=2e-5, rtol=1e-5)
        assert trained.config.get_text_config().tie_word_embeddings, 'the model itself is as it was'
