"Merged models: equal to the adapter within the precision, in bounded memory, and they stop"
import hashlib, json, logging, subprocess, sys
from contextlib import nullcontext
from pathlib import Path
import pytest, torch
from ftkit.chat import set_template
from ftkit.core import FtkitError
from ftkit.models import load_model, load_tokenizer, load_tuned, merge, save
from ftkit.mask import prompt_ids
from ftkit.tiny import train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

CHAT = [dict(role='user', content='Hello there')]
SIZES = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128)

def base_folder(folder, tied=True, dtype=torch.float32, vocab=260, shard='5GB', template=None, heads=4):
    "A random Llama on disk whose tokenizer has no template of its own"
    torch.manual_seed(0)
    tok = train_tokenizer([])
    if template: set_template(tok, template)
    else: tok.chat_template = None
    config = LlamaConfig(**SIZES, num_attention_heads=heads, vocab_size=max(vocab, len(tok)),
                         tie_word_embeddings=tied, initializer_range=.1)
    model = LlamaForCausalLM(config).to(dtype)
    tok.save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder

def shake(model, std=.03):
    "Random adapter weights, as if it had been trained"
    g = torch.Generator().manual_seed(1)
    for n,p in model.named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=g)*std
            with torch.no_grad(): p.copy_(p*(1+noise) if 'magnitude' in n else p+noise if 'token' in n else noise)

def logits(model, tok):
    with torch.no_grad(): return model.eval()(input_ids=torch.tensor([prompt_ids(tok, CHAT)])).logits.float()

def close(a, b):
    "Within the rounding of 32 bits, which depends on the size of the logits"
    torch.testing.assert_close(a, b, atol=2e-6*b.abs().max().item(), rtol=0)

def tuned(tmp_path, adapter='lora', precision='fp32', base=None, **options):
    base = base or base_folder(tmp_path/'base')
    tok = load_tokenizer(base)
    model = load_model(base, tok, adapter, precision, r=4, **options)
    shake(model)
    save(model, tok, tmp_path/'tuned')
    return tok,model

def digest(folder): return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}

KINDS = dict(lora={}, rslora=dict(use_rslora=True), dora=dict(use_dora=True),
             everywhere=dict(target_modules=['q_proj', 'down_proj', 'embed_tokens', 'lm_head'],
                             trainable_token_indices=None))

@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_in_32_bits_it_is_the_adapter_and_peft_s_own_merge(tmp_path, kind, tied):
    base = base_folder(tmp_path/'base', tied)
    before = digest(base)
    tok,model = tuned(tmp_path, base=base, **KINDS[kind])
    wanted = logits(model, tok)
    done = merge(tmp_path/'tuned', tmp_path/'merged', 'fp32')
    assert done.route == 'base' and done.distance['base'] < 1e-7 and digest(base) == before
    tok2,merged = load_tuned(tmp_path/'merged')
    close(logits(merged, tok2), wanted)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (tied and kind != 'everywhere')
    if kind == 'everywhere' and tied: return # PEFT's own merge adds both changes to the one matrix
    peft = model.merge_and_unload(safe_merge=True)
    for n,p in peft.named_parameters(): torch.testing.assert_close(merged.get_parameter(n), p, atol=1e-7, rtol=0)

@pytest.mark.parametrize('adapter', ['lora', 'qlora'])
@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_round_trips_in_16_bits(tmp_path, adapter, precision):
    tok,model = tuned(tmp_path, adapter, precision)
    wanted = logits(model, tok)
    tok2,again = load_tuned(tmp_path/'tuned')
    assert torch.equal(logits(again, tok2), wanted)
    done = merge(tmp_path/'tuned', tmp_path/'merged')
    assert done.precision == precision and done.route == ('base' if adapter == 'lora' else 'dequantized')
    tok3,merged = load_tuned(tmp_path/'merged')
    eps = torch.finfo(getattr(torch, dict(bf16='bfloat16', fp16='float16')[precision])).eps
    assert (logits(merged, tok3)-wanted).abs().max() < 4*eps*wanted.abs().max()
    assert set(done.distance) == {'base', 'half'} | ({'dequantized'} if adapter == 'qlora' else set())
    assert done.distance[done.route] < 1e-4
    moved,error = zip(*done.survival.values())
    assert len(moved) == 14 and .5 < min(moved) <= max(moved) <= 1 and 0 < max(error) < .5
    if adapter == 'qlora': assert done.distance['dequantized'] < done.distance['base']/10

def test_small_changes_are_lost_in_16_bits(tmp_path):
    base = base_folder(tmp_path/'base', dtype=torch.bfloat16)
    tok = load_tokenizer(base)
    for std in (.03, .001):
        model = load_model(base, tok, 'lora', 'bf16', r=4)
        shake(model, std)
        save(model, tok, tmp_path/'tuned')
        done = merge(tmp_path/'tuned', tmp_path/'merged', prompts=())
        moved,error = (sum(x)/len(x) for x in zip(*done.survival.values()))
        assert (moved > .8 and error < .2) if std > .01 else (moved < .2 and error > .5), (moved, error)

def test_shards_are_kept(tmp_path):
    base = base_folder(tmp_path/'base', shard='60KB', template='chatml')
    tok,model = tuned(tmp_path, base=base)
    merge(tmp_path/'tuned', tmp_path/'merged', 'fp32')
    names = lambda folder: sorted(f.name for f in folder.glob('model*'))
    assert len(names(base)) > 5 and names(base) == names(tmp_path/'merged')
    close(logits(load_tuned(tmp_path/'merged')[1], tok), logits(model, tok))
    from transformers import AutoModelForCausalLM
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path/'merged'), tok), logits(model, tok))

@pytest.mark.parametrize('options', [dict(rank_pattern={'q_proj': 2}), dict(init_lora_weights='pissa')], ids=str)
def test_other_adapters_are_merged_by_peft(tmp_path, options):
    tok,model = tuned(tmp_path, **options)
    wanted = logits(model, tok)
    assert merge(tmp_path/'tuned', tmp_path/'merged', 'fp32').route == 'peft'
    close(logits(load_tuned(tmp_path/'merged')[1], tok), wanted)

def test_what_cannot_be_merged_is_refused(tmp_path):
    tuned(tmp_path, lora_bias=True)
    with pytest.raises(FtkitError, match='cannot be merged: Impossible to merge LoRA with `lora_bias=True`'):
        merge(tmp_path/'tuned', tmp_path/'merged')
    assert not (tmp_path/'merged').exists()
    base = base_folder(tmp_path/'other')
    with pytest.raises(FtkitError, match='no adapter there'): merge(base, tmp_path/'merged')

def test_any_config_of_peft(tmp_path):
    from peft import IA3Config
    base = base_folder(tmp_path/'base', template='chatml')
    tok = load_tokenizer(base)
    model = load_model(base, tok, config=IA3Config(task_type='CAUSAL_LM'))
    shake(model)
    save(model, tok, tmp_path/'tuned')
    torch.testing.assert_close(logits(load_tuned(tmp_path/'tuned')[1], tok), logits(model, tok), atol=0, rtol=0)
    merge(tmp_path/'tuned', tmp_path/'merged', 'fp32')
    close(logits(load_tuned(tmp_path/'merged')[1], tok), logits(model, tok))

MERGE = """
import json, re, sys, threading, time
from pathlib import Path
from ftkit.models import merge
import peft, transformers.models.llama.modeling_llama
folder,most,over = Path(sys.argv[1]),0,threading.Event()
def own(): return 1024*int(re.search('RssAnon:[^0-9]*([0-9]+)', Path('/proc/self/status').read_text())[1])
def watch():
    global most
    while not over.wait(.001): most = max(most, own())
before,watched = own(),threading.Thread(target=watch)
watched.start()
done = merge(folder/'tuned', folder/'merged', prompts=() if sys.argv[2] == 'none' else ['What is 2 + 2?'])
over.set()
watched.join()
print(json.dumps(dict(grown=most-before, route=done.route, distance=done.distance)))
"""

def test_a_model_of_2_gb_is_merged_in_little_memory(tmp_path, adapter='lora', prompts='some'):
    "At most the largest file and 500 MB more than before, measuring included, without pages of files"
    def run(*args):
        done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done
    shape = json.dumps(dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, num_attention_heads=16,
                            vocab_size=4096))
    run(Path(__file__).parent/'tuned.py', tmp_path, shape, adapter, '400MB')
    sizes = [f.stat().st_size for f in (tmp_path/'base').glob('*.safetensors')]
    assert sum(sizes) > 2e9 and len(sizes) > 4
    said = json.loads(run('-c', MERGE, tmp_path, prompts).stdout.split('\n')[-2])
    print(f"{sum(sizes)/1e9:.2f} GB, largest file {max(sizes)/1e6:.0f} MB: {said['grown']/1e6:.0f} MB more; "
          f"{said['distance']}")
    assert said['grown'] < max(sizes) + 500e6
    files = [sorted((tmp_path/name).glob('*.safetensors')) for name in ('base', 'merged')]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    assert all(abs(a.stat().st_size-b.stat().st_size) < 4096 for a,b in zip(*files)), 'but for their headers'

def peft_folder(tmp_path, base, **options):
    "An adapter as PEFT writes it: no tokenizer, no record of ours; (folder, PEFT's model)"
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    options = dict(r=4, target_modules=['q_proj', 'down_proj'], task_type='CAUSAL_LM') | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    shake(model)
    model.save_pretrained(tmp_path/'peft')
    return tmp_path/'peft', model.eval()

@pytest.mark.parametrize('options', [{}, dict(target_modules=['q_proj', 'embed_tokens']),
    dict(use_dora=True, target_modules='.*up_proj'), dict(target_modules=['v_proj', 'lm_head']),
    dict(modules_to_save=['lm_head'])], ids=str)
def test_what_peft_wrote_is_read_and_merged(tmp_path, options):
    base = base_folder(tmp_path/'base', tied=False, template='chatml')
    folder,model = peft_folder(tmp_path, base, **options)
    tok,again = load_tuned(folder)
    close(logits(again, tok), logits(model, tok))
    merge(folder, tmp_path/'merged', 'fp32')
    close(logits(load_tuned(tmp_path/'merged')[1], tok), logits(model, tok))

@pytest.mark.parametrize('arch', ['gemma2', 'qwen3', 'phi3', 'mistral', 'gpt2', 'mixtral'])
def test_other_architectures_merge_to_the_adapter(tmp_path, arch):
    "Scaled embeddings, tied heads, fused projections, transposed weights, experts"
    from transformers import AutoConfig, AutoModelForCausalLM
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16,
                 vocab_size=260, initializer_range=.1, pad_token_id=0, num_local_experts=4)
    if arch == 'gpt2': sizes = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=260, initializer_range=.1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **sizes)).save_pretrained(tmp_path/'base')
    tok = train_tokenizer([])
    set_template(tok, 'chatml')
    tok.save_pretrained(tmp_path/'base')
    tok = load_tokenizer(tmp_path/'base')
    model = load_model(tmp_path/'base', tok, 'lora', 'fp32', r=4)
    shake(model)
    save(model, tok, tmp_path/'tuned')
    wanted = logits(model, tok)
    assert torch.equal(logits(load_tuned(tmp_path/'tuned')[1], tok), wanted)
    merge(tmp_path/'tuned', tmp_path/'merged', 'fp32')
    close(logits(load_tuned(tmp_path/'merged')[1], tok), wanted)

def test_nothing_else_is_overwritten(tmp_path):
    tok,_ = tuned(tmp_path)
    for name in ('user', 'tuned.tmp', 'merged.old'): (tmp_path/name).mkdir()
    (tmp_path/'user'/'thesis.txt').write_text('mine')
    (tmp_path/'file').write_text('mine')
    before = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    for out in ('base', 'tuned', 'base/merged', '.'):
        with pytest.raises(FtkitError, match='would be written over'): merge(tmp_path/'tuned', tmp_path/out, prompts=())
    for out in ('user', 'file'):
        with pytest.raises(FtkitError, match='did not write'): merge(tmp_path/'tuned', tmp_path/out, prompts=())
    merge(tmp_path/'tuned', tmp_path/'merged', prompts=())
    assert {f: f.read_bytes() for f in before} == before and (tmp_path/'merged.old').is_dir()

def test_a_killed_save_gives_the_earlier_model_back(tmp_path, monkeypatch):
    tok,model = tuned(tmp_path)
    before = digest(tmp_path/'tuned')
    rename = Path.rename
    def failing(self, to):
        if str(self).endswith('ftkit-new'): raise OSError('no')
        return rename(self, to)
    monkeypatch.setattr(Path, 'rename', failing)
    with pytest.raises(FtkitError, match='nothing was saved'): save(model, tok, tmp_path/'tuned')
    assert digest(tmp_path/'tuned') == before
    monkeypatch.undo()
    (tmp_path/'tuned').rename(tmp_path/'tuned.ftkit-old') # as a kill between the two renames leaves it
    save(model, tok, tmp_path/'tuned')
    assert sorted(f.name for f in tmp_path.iterdir()) == ['base', 'tuned']

def test_only_the_files_of_the_index_are_read(tmp_path):
    from safetensors.torch import load_file, save_file
    base = base_folder(tmp_path/'base', shard='60KB', template='chatml')
    tok,model = tuned(tmp_path, base=base, layers_to_transform=[0], target_modules=['q_proj', 'up_proj'])
    wanted,first = logits(model, tok),sorted(base.glob('model-*'))
    save_file({n: t*0 for n,t in load_file(first[0]).items()}, base/'zzz.safetensors', dict(format='pt'))
    merge(tmp_path/'tuned', tmp_path/'merged', 'fp32')
    close(logits(load_tuned(tmp_path/'merged')[1], tok), wanted)
    first[-1].unlink()
    with pytest.raises(FtkitError, match='1 of .* files are missing'):
        merge(tmp_path/'tuned', tmp_path/'other', prompts=())

def test_other_numbers_keep_their_dtype(tmp_path):
    from safetensors.torch import load_file, save_file
    base = base_folder(tmp_path/'base', template='chatml')
    more = load_file(base/'model.safetensors') | dict(aaa=torch.ones(3, dtype=torch.int64))
    save_file(more, base/'model.safetensors', dict(format='pt'))
    tuned(tmp_path, base=base)
    merge(tmp_path/'tuned', tmp_path/'merged', prompts=())
    weights = load_file(tmp_path/'merged'/'model.safetensors')
    assert torch.equal(weights.pop('aaa'), torch.ones(3, dtype=torch.int64))
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}

def test_a_rounded_sum_is_rounded_once(tmp_path):
    base = base_folder(tmp_path/'base', template='chatml')
    folder,model = peft_folder(tmp_path, base)
    merge(folder, tmp_path/'merged', prompts=())
    exact = model.merge_and_unload().model.layers[0].self_attn.q_proj.weight
    assert torch.equal(load_tuned(tmp_path/'merged')[1].model.layers[0].self_attn.q_proj.weight, exact.bfloat16())

SPOILED = {'adapter_model.safetensors: damaged': lambda d: (d/'adapter_model.safetensors').write_bytes(b'{'),
           'no adapter_model.safetensors': lambda d: (d/'adapter_model.safetensors').unlink(),
           'adapter_config.json: damaged': lambda d: (d/'adapter_config.json').write_text('{"r": '),
           'ftkit.json: damaged': lambda d: (d/'ftkit.json').write_text('{')}

@pytest.mark.parametrize('says', SPOILED)
def test_a_spoiled_adapter_is_refused_in_one_line(tmp_path, says):
    tuned(tmp_path)
    SPOILED[says](tmp_path/'tuned')
    for work in (load_tuned, lambda folder: merge(folder, tmp_path/'merged')):
        with pytest.raises(FtkitError, match=says) as e: work(tmp_path/'tuned')
        assert '\n' not in str(e.value)
    assert not (tmp_path/'merged').exists()

def test_merging_into_the_wrong_base_is_refused(tmp_path):
    tok,_ = tuned(tmp_path)
    wide = LlamaForCausalLM(LlamaConfig(**SIZES | dict(intermediate_size=192), num_attention_heads=4, vocab_size=264))
    wide.save_pretrained(tmp_path/'wide')
    for base,says in ((tmp_path/'wide', 'made for another model'), (tmp_path/'nowhere', 'no model there')):
        with pytest.raises(FtkitError, match=says): merge(tmp_path/'tuned', tmp_path/'merged', base=base)
    with pytest.raises(FtkitError, match="'fp8' is unknown"): merge(tmp_path/'tuned', tmp_path/'merged', 'fp8')
    with pytest.raises(FtkitError, match="route 'best' is unknown"): merge(tmp_path/'tuned', tmp_path/'m', route='best')

def test_a_base_in_four_bits_needs_the_whole_one_to_merge(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    base = base_folder(tmp_path/'base', template='chatml')
    tok = load_tokenizer(base)
    four = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    four.save_pretrained(tmp_path/'four')
    tok.save_pretrained(tmp_path/'four')
    tuned(tmp_path, base=tmp_path/'four')
    with pytest.raises(FtkitError, match='is stored in few bits'): merge(tmp_path/'tuned', tmp_path/'merged')
    merge(tmp_path/'tuned', tmp_path/'merged', base=base)

def test_what_it_costs_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    from ftkit import models
    tuned(tmp_path)
    def full(*args): raise OSError('disk full')
    monkeypatch.setattr(models, '_write_merged', full)
    with pytest.raises(FtkitError, match='nothing was saved'): merge(tmp_path/'tuned', tmp_path/'merged')
    said = capsys.readouterr().out
    assert 'KL from the adapter: base' in said and 'of the weights move' in said
    monkeypatch.undo()
    done = merge(tmp_path/'tuned', tmp_path/'merged', route='dequantized') # also where nobody would
    assert done.route == 'dequantized' and done.survival

def test_a_reward_model_is_saved_loaded_and_merged(tmp_path, monkeypatch):
    "With the score that was trained, and without a report that it is missing"
    from ftkit.evaluate import pair_scores
    from ftkit.tasks import pairs
    tok,said = load_tokenizer('embedded'),[]
    log,look = logging.getLogger('transformers.modeling_utils'),logging.Handler()
    look.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(log, 'handlers', [look])
    monkeypatch.setattr(log, 'level', logging.WARNING)
    log.manager._clear_cache()
    model,data = load_model('embedded', tok, reward=True),pairs(16)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p)*.02*p.requires_grad)
    save(model, tok, tmp_path/'run')
    done = merge(tmp_path/'run', tmp_path/'merged', 'fp32')
    assert done.route == 'peft'
    models = model, *(load_tuned(tmp_path/f)[1] for f in ('run', 'merged'))
    a,b,c = (torch.cat(pair_scores(m, tok, data)) for m in models)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, c, atol=1e-4, rtol=1e-4)
    assert a.std() > .01 and not any('score.weight' in s for s in said)
    monkeypatch.setattr('ftkit.models._unreported', nullcontext)
    load_model('embedded', tok, reward=True)
    assert any('score.weight' in s for s in said)
