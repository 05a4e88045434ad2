"Counted memory: equal to the byte to models of transformers, to files, to bitsandbytes, PEFT and optimizers"
import json
import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM
from ftkit.core import FtkitError
from ftkit.memory import FAMILIES, Part, adapter_parts, kept, nf4_bytes, parts, state_bytes, weight_bytes
from ftkit.simulate import simulate

SHAPE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
             vocab_size=1000, head_dim=64, pad_token_id=0)
MORE = dict(mixtral=dict(num_local_experts=4),
            qwen3_moe=dict(num_experts=4, moe_intermediate_size=96, decoder_sparse_step=1))

def config(kind, **more): return AutoConfig.for_model(kind, **SHAPE | MORE.get(kind, {}) | more)

@pytest.mark.parametrize('more', [{}, dict(tie_word_embeddings=True), dict(tie_word_embeddings=False),
                                  dict(attention_bias=True), dict(mlp_bias=True)], ids=str)
@pytest.mark.parametrize('kind', FAMILIES)
def test_every_family_has_the_weights_of_its_model(kind, more):
    "Each shape as often as in the real one, with switches that a family has or has not"
    c = config(kind, **more)
    with torch.device('meta'): model = AutoModelForCausalLM.from_config(c)
    real = sorted(tuple(p.shape) for p in model.parameters())
    assert sorted(s for p in parts(c) for s in [p.shape]*p.times) == real
    linear = sorted(tuple(m.weight.shape) for n,m in model.named_modules()
                    if isinstance(m, torch.nn.Linear) and n != 'lm_head')
    assert sorted(s for p in parts(c) for s in [p.shape]*p.times if p.linear) == linear

@pytest.mark.parametrize('name', ['Qwen3-1.7B', 'Qwen2.5-3B', 'gemma2_2b_it'])
def test_files_on_the_hub(shared, name):
    folder = shared/'memory'/'configs'/name
    total = json.loads((folder/'model.safetensors.index.json').read_text())['metadata']['total_size']
    twice = 2*151936*2048 if name == 'Qwen3-1.7B' else 0 # its files hold the tied table twice
    assert weight_bytes(parts(folder), 'bf16') + twice == total

@pytest.mark.parametrize('double', [True, False])
@pytest.mark.parametrize('shape', [(64, 256), (48, 100), (1000, 768), (1, 64)])
def test_four_bits_are_bitsandbytes(shape, double):
    "Every tensor that belongs to a quantised weight"
    import bitsandbytes as bnb
    four = bnb.nn.Linear4bit(shape[1], shape[0], compute_dtype=torch.half, compress_statistics=double, quant_type='nf4',
                             device='meta')
    four.weight = bnb.nn.Params4bit(torch.randn(shape).half(), requires_grad=False, quant_type='nf4',
                                    compress_statistics=double, module=four).to('cpu')
    q = four.weight.quant_state
    tensors = [four.weight, q.absmax, q.code] + ([q.offset, q.state2.absmax, q.state2.code] if double else [])
    assert sum(t.numel()*t.element_size() for t in tensors) == nf4_bytes(shape[0]*shape[1], double)

@pytest.mark.parametrize('options', [{}, dict(r=4, targets=['q_proj', 'v_proj']), dict(r=8, dora=True)], ids=str)
@pytest.mark.parametrize('kind', ['llama', 'qwen2', 'phi3', 'gemma2', 'qwen3_moe'])
def test_adapters_are_pefts(kind, options):
    from peft import LoraConfig, get_peft_model
    c,targets = config(kind),options.get('targets', 'all-linear')
    if kind == 'phi3' and targets != 'all-linear': pytest.skip('its projections are one')
    if kind == 'qwen3_moe' and targets == 'all-linear':
        with pytest.raises(FtkitError, match='experts share a matrix'): adapter_parts(parts(c), **options)
        return
    with torch.device('meta'): model = get_peft_model(AutoModelForCausalLM.from_config(c), LoraConfig(
        r=options.get('r', 16), target_modules=targets, use_dora=options.get('dora', False)))
    real = sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad)
    assert sorted(s for p in adapter_parts(parts(c), **options) for s in [p.shape]*p.times) == real

@pytest.mark.parametrize('method', ['full', 'lora', 'qlora'])
@pytest.mark.parametrize('optim', ['adamw_torch', 'adamw_torch_fused', 'adamw_8bit', 'paged_adamw_8bit', 'sgd'])
def test_what_is_kept_is_what_is_traced(method, optim):
    "Of a real step: weights, adapter, gradients and states"
    c = config('qwen2', tie_word_embeddings=False)
    found,counted = simulate(c, method, length=8, optim=optim),kept(c, method, optim=optim)
    total = lambda kind: sum(e.size for e in found.events if e.n > 0 and found.kind(e) == kind)
    scales = sum(e.size for e in found.events if e.n > 0 and found.kind(e) == 'other weights' and not e.op)
    buffers = 4*32 # frequencies of rotary embeddings, twice
    extra = scales - 2*buffers - 8*8 if method == 'qlora' else 0 # and eight ids
    assert total('weights') + extra == counted.weights
    assert total('adapter') == counted.adapter and total('gradients') == 2*counted.gradients
    maps = 0 if '8bit' not in optim else 2*4*256 # what a byte stands for, once
    assert abs(total('optimizer states') - counted.states) <= maps

def test_states_are_those_of_real_optimizers():
    import bitsandbytes as bnb
    shapes = (300, 200), (64,), (10, 10)
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    for name,make in (('adamw_torch', torch.optim.AdamW), ('adamw_8bit', bnb.optim.AdamW8bit)):
        made = make(params, lr=1e-3)
        for p in params: p.grad = torch.randn_like(p)
        made.step()
        real = sum(t.numel()*t.element_size() for state in made.state.values() for k,t in state.items()
                   if isinstance(t, torch.Tensor) and not k.startswith('qmap'))
        assert real == state_bytes([Part('w', s) for s in shapes], name)

def test_the_guides_numbers():
    "Seven billion weights: 112 GB in 32 bits, half of it in 16; seventy billion: 1,120 GB"
    for billions,gb in ((7, 112), (70, 1120)):
        shape = dict(hidden_size=1000, num_hidden_layers=1, num_attention_heads=1, intermediate_size=1)
        words = billions*10**6 - 4006 # with the one layer exactly so many weights
        k = kept(dict(model_type='llama', vocab_size=words, tie_word_embeddings=True) | shape, 'full', 'fp32')
        total = k.weights + k.gradients + k.states
        assert abs(total/10**9 - gb) < 1e-4

@pytest.mark.parametrize('broken,says', [
    (dict(model_type='mamba2'), "family 'mamba2'"), (dict(num_attention_heads=None), 'num_attention_heads'),
    (dict(vocab_size=-5), 'vocab_size'), (dict(hidden_size='wide'), 'hidden_size'),
    (dict(model_type=None), "family 'None'"), (dict(model_type='mixtral'), 'num_local_experts'),
    (dict(num_key_value_heads=-2), 'num_key_value_heads'), (dict(num_key_value_heads='2'), 'num_key_value_heads'),
    (dict(model_type='gemma2', head_dim=None), 'without head_dim'),
    (dict(vision_config=dict(layers=3)), 'more than text'),
    (dict(text_config=dict(layers=3)), 'more than text'), (dict(model_type=['llama']), 'family'),
    (dict(model_type='qwen3_moe', num_experts=4, moe_intermediate_size=8, mlp_only_layers=[0]), 'no experts')])
def test_configs_that_cannot_be_counted(broken, says):
    with pytest.raises(FtkitError, match=says): parts(config('llama').to_dict() | broken)

@pytest.mark.parametrize('options,says', [
    (dict(r='a'), 'whole number'), (dict(r=1.5), 'whole number'), (dict(targets=None), 'no targets'),
    (dict(alpha=3), 'alpha'),
    (dict(targets=['q_proj', 5]), 'no linear layer is called 5'), (dict(dtype=['bf16']), 'dtype'),
    (dict(method='full', r=3), 'no option of full')])
def test_options_that_are_none(options, says):
    with pytest.raises(FtkitError, match=says): kept(config('llama'), **options)

@pytest.mark.parametrize('what', [None, [1], '/no/where', 7])
def test_what_is_no_config(what):
    with pytest.raises(FtkitError, match='no config.json'): parts(what)

@pytest.mark.parametrize('kind', FAMILIES)
def test_a_config_with_nothing_but_sizes(kind):
    "As the real class would fill it in, or refused"
    few = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, vocab_size=1000)
    few |= {k: v for k,v in MORE.get(kind, {}).items()}
    try: counted = sum(p.size for p in parts(few | dict(model_type=kind)))
    except FtkitError as e: assert 'without' in str(e)
    else:
        c = AutoConfig.for_model(kind, **few, pad_token_id=0)
        with torch.device('meta'): model = AutoModelForCausalLM.from_config(c)
        assert counted == sum(p.numel() for p in model.parameters())

def test_nothing_but_the_standard_library(tmp_path):
    import subprocess, sys
    code = ("import sys; from ftkit.memory import kept; kept(dict(model_type='llama', hidden_size=64, "
            "num_hidden_layers=1, num_attention_heads=2, vocab_size=100, intermediate_size=64)); "
            "assert not {'torch', 'numpy', 'transformers'} & {*sys.modules}")
    subprocess.run([sys.executable, '-c', code], check=True)
