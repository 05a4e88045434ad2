"Four-bit weights equal bitsandbytes: levels, codes, scales, values, LoftQ, and the optimizer in eight bits"
import inspect, math
import pytest, torch
from ftkit.core import FtkitError
from ftkit.lora import add_lora, lora_layers
from ftkit.nf4 import (NF4Linear, adamw8bit, dequantize, dequantize8, levels, levels8, loftq, quantize, quantize8,
                       quantize_model)
from ftkit.tiny import tiny
BF = pytest.importorskip('bitsandbytes.functional')

g = torch.Generator().manual_seed(0)
randn = lambda *shape: torch.randn(*shape, generator=g)
outlier = randn(64, 128)*.02
outlier[5, 7] = 1e4
ADVERSARIAL = dict(normal=randn(256, 512)*.02, zeros=torch.zeros(64, 64),
    one_zero_block=torch.cat([torch.zeros(64), randn(128)]), outlier=outlier, tiny=randn(100, 64)*1e-30,
    huge=randn(100, 64)*1e30, denormal=randn(64, 64)*1e-41, equal=torch.full((64, 64), -.3),
    on_the_edges=((levels()[1:]+levels()[:-1])/2).repeat(64), odd=randn(37, 41), short=randn(5), one=randn(1),
    zero_end=torch.cat([randn(64), torch.zeros(7)]), large=randn(1000, 1003)*.05)

def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))

def compare(weight, kind, double):
    ours = quantize(weight, kind, double=double)
    theirs,state = BF.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    assert torch.equal(ours.codes, theirs.flatten()), 'codes'
    assert same_bits(ours.absmax, state.absmax), 'scales'
    if double: assert same_bits(ours.second[0], state.state2.absmax) and same_bits(ours.second[1], state.offset)
    return ours,theirs,state

@pytest.mark.parametrize('double', [False, True])
@pytest.mark.parametrize('kind', ['nf4', 'fp4'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ADVERSARIAL)
def test_codes_scales_and_values(name, dtype, kind, double):
    weight = ADVERSARIAL[name].to(dtype)
    if not weight.isfinite().all(): return refused(weight)
    ours,theirs,state = compare(weight, kind, double)
    assert same_bits(dequantize(ours), BF.dequantize_4bit(theirs, state).view(weight.shape))

def refused(weight):
    with pytest.raises(FtkitError, match='infinities or NaN'): quantize(weight)

def test_what_is_not_finite_is_refused():
    for bad in (math.inf, math.nan): refused(torch.tensor([1., bad, 2.]))

def test_the_comparison_sees_one_code():
    weight = ADVERSARIAL['normal'].clone()
    ours = quantize(weight)
    weight[3, 4] += .01
    assert not torch.equal(ours.codes, BF.quantize_4bit(weight, quant_type='nf4')[0].flatten())

def test_real_weights(shared):
    from safetensors.torch import load_file
    files = sorted(shared.rglob('model.safetensors'))
    n = 0
    for file in files:
        for name,weight in load_file(file).items():
            if weight.ndim != 2 or weight.shape[1] % 16 == 0 and weight.shape[1] % 64: continue
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                ours,theirs,state = compare(weight.to(dtype), 'nf4', True)
                assert same_bits(dequantize(ours), BF.dequantize_4bit(theirs, state))
                n += 1
    assert n > 50
    print(f'{n} matrices of {len(files)} models, code for code')

@pytest.mark.parametrize('width', [16, 32, 48, 96, 160, 1000])
def test_every_width(width):
    "Some bitsandbytes kernels take the wrong scale in rows that are not whole blocks; its reference does not"
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    weight = randn(24, width)
    ours,theirs,state = compare(weight, 'nf4', False)
    reference = _dequantize_4bit_compute(theirs.flatten(), state.absmax, state.code, 64, weight.shape, torch.float32)
    assert same_bits(dequantize(ours), reference)
    if not torch.equal(BF.dequantize_4bit(theirs, state), reference): print(f'{width}: bitsandbytes is wrong here')

def test_levels_are_derived():
    assert same_bits(levels('nf4'), BF.get_4bit_type('nf4', 'cpu'))
    assert torch.equal(levels('fp4'), BF.get_4bit_type('fp4', 'cpu'))
    assert torch.equal(levels('int4')[1:]*7, torch.arange(-7., 8))
    for signed in (True, False): assert same_bits(levels8(signed), BF.create_dynamic_map(signed))

def test_each_nf4_code_is_used_equally_often():
    "Nearly: sixteenths of the distribution of scaled weights"
    codes = quantize(randn(1_000_000)).codes
    share = torch.bincount(torch.cat([codes>>4, codes&15]).int(), minlength=16)/1e6
    assert share[1:-1].min() > .03 and share.max() < .11

@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('n', [1, 255, 256, 257, 100_000])
def test_eight_bits(n, signed):
    code = BF.create_dynamic_map(signed)
    for scale in (1., 1e-7, 0.):
        x = randn(n)*scale
        x = x if signed else x.abs()
        codes,absmax = quantize8(x, signed=signed)
        theirs,state = BF.quantize_blockwise(x, code=code, blocksize=256)
        assert torch.equal(codes, theirs) and same_bits(absmax, state.absmax)
        assert torch.equal(dequantize8(codes, absmax, signed=signed), BF.dequantize_blockwise(theirs, state))

def test_bits_are_measured():
    weight = randn(4096, 1024)
    measured = [round(quantize(weight, double=d).bits, 3) for d in (False, True)]
    assert measured == [4.5, 4.127]
    theirs = BF.quantize_4bit(weight, quant_type='nf4', compress_statistics=True)
    nbytes = theirs[0].nbytes + theirs[1].absmax.nbytes + theirs[1].state2.absmax.nbytes + 4
    assert quantize(weight, double=True).nbytes == nbytes

def test_a_layer_equals_bitsandbytes_layer():
    import bitsandbytes as bnb
    linear = torch.nn.Linear(128, 64)
    theirs = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type='nf4', compress_statistics=True)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to('cpu')
    theirs.support_avx512bf16_for_cpu = False
    ours,x = NF4Linear(linear),randn(5, 128)
    outs,grads = [],[]
    for layer in (ours, theirs):
        own = x.clone().requires_grad_()
        out = layer(own)
        out.pow(2).sum().backward()
        outs.append(out.detach()), grads.append(own.grad)
    torch.testing.assert_close(*outs, atol=1e-6, rtol=0)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=0)
    assert {n: p.numel() for n,p in ours.named_parameters() if p.requires_grad} == {'bias': 64}

def test_loftq_equals_peft():
    from peft.utils import loftq_utils
    source = inspect.getsource(loftq_utils.loftq_init).replace('"xpu" if is_xpu_available() else "cuda"', '"cpu"')
    assert '"cpu"' in source # PEFT's own runs on GPUs only
    exec(source, scope := dict(vars(loftq_utils)))
    weight = randn(128, 64)*.05
    for iterations in (1, 3):
        q,a,b = scope['loftq_init'](weight, 4, 8, iterations)
        our_a,our_b,our_q = loftq(weight, 8, iterations)
        assert torch.equal(our_q, q)
        torch.testing.assert_close(our_b@our_a, b@a, atol=1e-6, rtol=0)
    tok,model = tiny()
    add_lora(model, 8, 16, init=lambda w,r: loftq(w, r, 3))
    fresh = tiny()[1]
    for name,layer in lora_layers(model).items():
        off = layer.merged(layer.adapters['default'], layer.matrix()) - fresh.get_submodule(name).weight
        lost = dequantize(quantize(w := fresh.get_submodule(name).weight)) - w
        assert off.norm() < .8*lost.norm()

def test_adamw8bit_equals_bitsandbytes():
    import bitsandbytes as bnb
    start = randn(128, 96)
    ours,theirs,state = start.clone(),torch.nn.Parameter(start.clone()),{}
    optimizer = bnb.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=.1)
    for _ in range(20):
        grad = randn(128, 96)
        theirs.grad = grad.clone()
        optimizer.step()
        adamw8bit(ours, grad, state, 1e-2, weight_decay=.1)
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=0)
    kept = optimizer.state[theirs]
    assert torch.equal(state['m'][0], kept['state1']) and torch.equal(state['v'][0], kept['state2'])

def test_a_quantised_model_holds_four_bits():
    tok,model = tiny()
    before = sum(p.nbytes for p in model.parameters())
    linear = sum(m.weight.nbytes for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    quantize_model(model)
    quantised = sum(m.q.nbytes for m in model.modules() if isinstance(m, NF4Linear))
    after = sum(p.nbytes for p in model.parameters()) + quantised
    assert abs((before-after) - linear*(1-4.2/32)) < linear*.01
