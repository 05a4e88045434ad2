"Real models: every kind of adapter trains, is saved, loaded and merged right; what is broken is refused in one line"
import json, subprocess, sys
import pytest, torch
from ftkit.core import FtkitError
from ftkit.mask import encode
from ftkit.models import check_gradients, load_model, load_tokenizer, load_tuned, merge, save
from test_merge import base_folder, logits, shake

ROW = [dict(role='user', content='What is 2 + 2?'), dict(role='assistant', content='4')]
def batch(tok): return {c: torch.tensor([v, v]) for c,v in encode(tok, ROW).items()}

KINDS = dict(lora={}, dora=dict(use_dora=True), rslora=dict(use_rslora=True), pissa=dict(init_lora_weights='pissa'),
             qlora=dict(adapter='qlora'), qdora=dict(adapter='qlora', use_dora=True), full=dict(adapter='full'),
             head=dict(target_modules=['q_proj', 'lm_head'], trainable_token_indices=None),
             embedding=dict(target_modules=['v_proj', 'embed_tokens'], trainable_token_indices=None))

@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_everything_that_is_trained_has_a_gradient(tmp_path, kind, checkpointing):
    tok = load_tokenizer(base_folder(tmp_path/'base', template='chatml'))
    model = load_model(tmp_path/'base', tok, **dict(adapter='lora', r=4) | KINDS[kind])
    if checkpointing: model.gradient_checkpointing_enable(dict(use_reentrant=False))
    else: model.gradient_checkpointing_disable()
    before = logits(model, tok)
    assert check_gradients(model, batch(tok)) == []
    assert torch.equal(logits(model, tok), before), 'the two steps are taken back'

def test_broken_set_ups_are_named(tmp_path):
    tok = load_tokenizer(base_folder(tmp_path/'base', template='chatml'))
    model = load_model(tmp_path/'base', tok, r=4, trainable_token_indices=None)
    model.gradient_checkpointing_enable(dict(use_reentrant=True)) # cuts the graph: the embedding is frozen
    model.base_model.model.disable_input_require_grads()
    assert 'the graph' in check_gradients(model, batch(tok))[0]
    model.gradient_checkpointing_disable()
    model.requires_grad_(False)
    assert check_gradients(model, batch(tok)) == ['nothing is trained: every parameter is frozen']
    model = load_model(tmp_path/'base', tok, r=4)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.scaling['default'] = 0.
    found = check_gradients(model, batch(tok))
    says = 'layers.1.mlp.down_proj.lora_B.default.weight is still zero after two steps'
    assert len(found) == 1 and found[0].endswith(says)

@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
@pytest.mark.parametrize('template', ['chatml', None])
@pytest.mark.parametrize('kind', KINDS)
def test_saved_and_loaded_to_equal_logits(tmp_path, kind, template, precision):
    "Also where the tokenizer does not know the template's tokens and the embedding grows"
    base = base_folder(tmp_path/'base', kind != 'head', template=template)
    tok = load_tokenizer(base)
    model = load_model(base, tok, **dict(adapter='lora', r=4) | KINDS[kind], precision=precision)
    shake(model)
    save(model, tok, tmp_path/'tuned')
    tok2,again = load_tuned(tmp_path/'tuned')
    wanted = logits(model, tok)
    # PiSSA's frozen rest is computed again, and rounded to the base's precision again
    atol = 4*torch.finfo(model.dtype).eps*wanted.abs().max().item() if kind == 'pissa' else 0
    torch.testing.assert_close(logits(again, tok2), wanted, atol=atol, rtol=0)

def test_precision_follows_the_machine(monkeypatch):
    from ftkit import models
    from ftkit.core import Device
    for machine,precision in ((Device(), 'fp32'), (Device('cuda', 'T4', (7, 5), 16*2**30), 'fp16'),
                              (Device('cuda', 'L4', (8, 9), 24*2**30), 'bf16')):
        monkeypatch.setattr(models, 'device', lambda machine=machine: machine)
        assert models._precision() == precision

def test_the_seed_decides_the_start_and_leaves_the_worlds_alone(tmp_path):
    tok = load_tokenizer(base_folder(tmp_path/'base', template='chatml'))
    state = torch.get_rng_state()
    start = [load_model(tmp_path/'base', tok, r=4, seed=seed).get_parameter(
        'base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight') for seed in (0, 0, 1)]
    assert torch.equal(start[0], start[1]) and not torch.equal(start[0], start[2])
    assert torch.equal(torch.get_rng_state(), state)

def test_options_that_do_not_go_together(tmp_path):
    tok = load_tokenizer(base_folder(tmp_path/'base', template='chatml'))
    for options,says in ((dict(adapter='qlora', init_lora_weights='pissa'),
                          'does not go with this model: Please initialize PiSSA'),
                         (dict(use_doras=True), 'does not go with this model: .*use_doras'), (dict(r=0), 'r=0'),
                         (dict(target_modules=['query']), 'Target modules'),
                         (dict(engine='jax'), "engine 'jax' is unknown"),
                         (dict(adapter='loro'), "adapter 'loro' is unknown"),
                         (dict(precision='fp8'), "precision 'fp8' is unknown: use fp32, fp16 or bf16"),
                         (dict(engine='unsloth', adapter='full'), 'is for lora and qlora'),
                         (dict(engine='unsloth'), 'environment of its own')):
        with pytest.raises(FtkitError, match=says): load_model(tmp_path/'base', tok, **options)

def test_a_quantised_base_is_not_tuned_in_full(tmp_path):
    tok = load_tokenizer(base_folder(tmp_path/'base', template='chatml'))
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    four = AutoModelForCausalLM.from_pretrained(tmp_path/'base', quantization_config=four_bit)
    four.save_pretrained(tmp_path/'four')
    tok.save_pretrained(tmp_path/'four')
    with pytest.raises(FtkitError, match='quantised and cannot be trained'): load_model(tmp_path/'four', tok, 'full')
    model = load_model(tmp_path/'four', tok, r=4)
    assert check_gradients(model, batch(tok)) == []

def test_rows_that_bitsandbytes_misreads_stay_whole(tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM
    tok = load_tokenizer(base_folder(tmp_path/'tok', template='chatml'))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=96, intermediate_size=128, num_hidden_layers=2,
                                         num_attention_heads=4, vocab_size=260, initializer_range=.1))
    model.save_pretrained(tmp_path/'base')
    tok.save_pretrained(tmp_path/'base')
    four = load_model(tmp_path/'base', tok, 'qlora', r=4)
    if not torch.cuda.is_available(): assert 'layers such as' in capsys.readouterr().out
    wanted = logits(model, tok)
    assert (logits(four, tok)-wanted).norm() < .3*wanted.norm()

def spoiled(tmp_path):
    "{what: (how to spoil a folder, what is said)}"
    def cut(f): f.write_bytes(f.read_bytes()[:-1000])
    def drop_weight(d):
        from safetensors.torch import load_file, save_file
        weights = load_file(d/'model.safetensors')
        weights.pop('model.norm.weight')
        save_file(weights, d/'model.safetensors', dict(format='pt'))
    def pickle(d):
        torch.save({'w': torch.zeros(1)}, d/'pytorch_model.bin')
        (d/'model.safetensors').unlink()
    def remote(d):
        config = json.loads((d/'config.json').read_text())
        auto = dict(AutoConfig='own.Config', AutoModelForCausalLM='own.Model')
        (d/'config.json').write_text(json.dumps(config | dict(model_type='own', auto_map=auto)))
        (d/'own.py').write_text('raise SystemExit("code was run")')
    return {'config.json is missing': lambda d: (d/'config.json').unlink(),
            'damaged or cut short': lambda d: cut(d/'model.safetensors'),
            'no weights there': lambda d: (d/'model.safetensors').unlink(), 'its weights are pickles': pickle,
            'comes with Python code of its own': remote,
            '1 weights are missing, such as model.norm.weight': drop_weight,
            'no model there': lambda d: (d/'config.json').write_text('{"model_type": "llamma"}'),
            'config.json': lambda d: (d/'config.json').write_text('{"model_type": ')}

@pytest.mark.parametrize('says', spoiled(None))
def test_a_spoiled_base_is_refused_in_one_line(tmp_path, says):
    base = base_folder(tmp_path/'base', template='chatml')
    tok = load_tokenizer(base)
    spoiled(tmp_path)[says](base)
    with pytest.raises(FtkitError, match=says) as e: load_model(base, tok)
    assert '\n' not in str(e.value) and 'base' in str(e.value)

def test_pickles_are_read_when_asked_for(tmp_path):
    base = base_folder(tmp_path/'base', template='chatml')
    tok = load_tokenizer(base)
    wanted = logits(load_model(base, tok, None), tok)
    from safetensors.torch import load_file
    torch.save(load_file(base/'model.safetensors'), base/'pytorch_model.bin')
    (base/'model.safetensors').unlink()
    assert torch.equal(logits(load_model(base, tok, None, pickles=True), tok), wanted)

def test_another_models_adapter_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    base = base_folder(tmp_path/'base', template='chatml')
    tok = load_tokenizer(base)
    model = load_model(base, tok, r=4)
    shake(model)
    save(model, tok, tmp_path/'tuned')
    sizes = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4, vocab_size=260)
    others = dict(wider=LlamaForCausalLM(LlamaConfig(**sizes | dict(intermediate_size=192))),
                  shallower=LlamaForCausalLM(LlamaConfig(**sizes | dict(num_hidden_layers=1))),
                  gpt2=GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=260)))
    for name,other in others.items():
        other.save_pretrained(tmp_path/name)
        tok.save_pretrained(tmp_path/name)
        with pytest.raises(FtkitError, match='made for another model') as e:
            load_tuned(tmp_path/'tuned', base=tmp_path/name)
        assert '\n' not in str(e.value)
    file = tmp_path/'tuned'/'adapter_model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FtkitError, match='damaged or cut short'): load_tuned(tmp_path/'tuned')

def test_an_adapter_of_another_vocabulary_is_refused(tmp_path):
    big = base_folder(tmp_path/'big', template='llama3')
    tok = load_tokenizer(big)
    model = load_model(big, tok, r=4, target_modules=['q_proj', 'lm_head'], trainable_token_indices=None)
    save(model, tok, tmp_path/'tuned')
    small = base_folder(tmp_path/'small', vocab=320, template='chatml')
    with pytest.raises(FtkitError, match='made for another model: size mismatch'):
        load_tuned(tmp_path/'tuned', base=small)

def test_a_changed_prompt_is_noticed(tmp_path):
    base = base_folder(tmp_path/'base', template='chatml')
    tok = load_tokenizer(base)
    save(load_model(base, tok, r=4), tok, tmp_path/'tuned')
    prompt = json.loads((tmp_path/'tuned'/'prompt.json').read_text())
    assert prompt['text'].endswith('<|im_start|>assistant\n') and prompt['input_ids']
    load_tuned(tmp_path/'tuned')
    template = tmp_path/'tuned'/'chat_template.jinja'
    template.write_text(template.read_text().replace('assistant', 'bot'))
    with pytest.raises(FtkitError, match='writes another prompt than when it was saved'): load_tuned(tmp_path/'tuned')

FULL_DISK = """
import resource, sys
from pathlib import Path
from ftkit.models import load_model, load_tokenizer, merge, save
folder = Path(sys.argv[1])
tok = load_tokenizer('embedded')
if sys.argv[2] == 'save': work = lambda model=load_model('embedded', tok): save(model, tok, folder/'tuned')
else: work = lambda: merge(folder/'tuned', folder/'merged')
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)) # no file may grow larger
try: work()
except ValueError as e: print(type(e).__name__, e)
"""

@pytest.mark.parametrize('what', ['save', 'merge'])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, what):
    tok = load_tokenizer('embedded')
    save(load_model('embedded', tok), tok, tmp_path/'tuned')
    before = {f: f.read_bytes() for f in (tmp_path/'tuned').iterdir()}
    run = subprocess.run([sys.executable, '-c', FULL_DISK, str(tmp_path), what], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-1000:]
    assert 'FtkitError' in run.stdout and 'cannot be written' in run.stdout and 'nothing was saved' in run.stdout
    assert {f: f.read_bytes() for f in (tmp_path/'tuned').iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ['tuned']

def learn(model, tok, steps=60, lr=2e-2):
    "Learn one answer by heart, with the token that ends it"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    model.train()
    for _ in range(steps):
        loss = model(**batch(tok)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()

def answer(model, tok):
    "(text, did it stop by itself?)"
    from ftkit.mask import prompt_ids
    ids = torch.tensor([prompt_ids(tok, ROW[:1])])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20)
    out = out[0, ids.shape[1]:].tolist()
    stops = model.generation_config.eos_token_id
    stopped = out[-1] in (stops if isinstance(stops, list) else [stops]) and len(out) < 20
    return tok.decode(out, skip_special_tokens=True), stopped

@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
@pytest.mark.parametrize('kind', ['lora', 'dora', 'qlora', 'full'])
def test_it_stops_at_the_end_of_its_turn(tmp_path, kind, precision, tied):
    "Tuned, saved, loaded and merged; the tokenizer does not know the template's tokens, so the embedding grows"
    base = base_folder(tmp_path/'base', tied)
    tok = load_tokenizer(base)
    model = load_model(base, tok, **dict(adapter='lora', r=4) | KINDS[kind], precision=precision)
    assert not answer(model, tok)[1], 'before, it does not stop'
    learn(model, tok, lr=2e-3 if kind == 'full' else 2e-2)
    save(model, tok, tmp_path/'tuned')
    tok2,again = load_tuned(tmp_path/'tuned')
    assert answer(model, tok) == answer(again, tok2) == ('4', True)
    if kind == 'full': return
    merge(tmp_path/'tuned', tmp_path/'merged')
    tok3,merged = load_tuned(tmp_path/'merged')
    assert answer(merged, tok3) == ('4', True)
    from transformers import AutoModelForCausalLM
    assert answer(AutoModelForCausalLM.from_pretrained(tmp_path/'merged'), tok3) == ('4', True)
