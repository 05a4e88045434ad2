"The core of every objective against the plain formula: values, gradients, heads of every kind, and what is never built"
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from ftkit.logps import head, hidden_states, label_logps, score, token_logps

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)
KINDS = dict(llama={}, qwen2={}, qwen3={}, mistral={}, gemma=dict(), gemma2=dict(final_logit_softcapping=2.),
             gemma3_text={}, cohere=dict(logit_scale=.3), cohere2=dict(logit_scale=.3), granite=dict(logits_scaling=7.),
             phi3={}, olmo2={}, mixtral=dict(num_local_experts=2), qwen3_moe=dict(num_experts=2, num_experts_per_tok=1),
             falcon_h1=dict(lm_head_multiplier=.2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8), smollm3={},
             hyperclovax=dict(logits_scaling=.5), nemotron={}, stablelm={}, starcoder2={})
SMALL = dict(gpt2=dict(n_embd=32, n_layer=2, n_head=4), bloom=dict(hidden_size=32, n_layer=2, n_head=4),
             gpt_neox={k: v for k,v in SIZES.items() if k not in ('num_key_value_heads', 'head_dim')},
             mpt=dict(d_model=32, n_layers=2, n_heads=4),
             phi={k: v for k,v in SIZES.items() if k not in ('num_key_value_heads', 'head_dim')})

def built(kind):
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    options = SIZES | KINDS[kind] if kind in KINDS else dict(vocab_size=300) | SMALL[kind]
    try: config = AutoConfig.for_model(kind, **options)
    except ValueError: pytest.skip(f'this transformers has no {kind}')
    return AutoModelForCausalLM.from_config(config).eval()

def loud(model, std=.5):
    "Weights of the head large enough for logits that matter"
    layer = model.get_output_embeddings()
    torch.nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None: torch.nn.init.normal_(layer.bias)

@pytest.mark.parametrize('kind', [*KINDS, *SMALL])
def test_every_architecture(kind):
    "Scales, caps, biases and tied heads are found, and the measured head gives the model's own log-probabilities"
    model = built(kind)
    loud(model)
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    found = head(model)
    assert found.layer is model.get_output_embeddings(), f'{kind}: a scale or cap that head does not know'
    hidden = hidden_states(model, found, input_ids=ids)
    ours = token_logps(hidden, found.layer, ids, chunk=5, scale=found.scale, softcap=found.softcap)
    whole,_ = label_logps(model(input_ids=ids).logits, ids)
    assert whole.std() > .1
    torch.testing.assert_close(ours, whole, atol=5e-6, rtol=1e-6)

def test_a_name_that_means_nothing_is_noticed():
    "MPT has a logit_scale in its configuration and does not use it"
    model = built('mpt')
    loud(model)
    assert head(model).layer is model.get_output_embeddings()
    model.config.logit_scale = .5
    assert head(model).layer is None

def gradients(model, value, weights):
    model.zero_grad()
    (value*weights).sum().backward()
    return {n: p.grad.clone() for n,p in model.named_parameters() if p.grad is not None}

def adapted(how):
    model = built('qwen2')
    if how == 'full': return model
    from peft import LoraConfig, get_peft_model
    config = dict(lora=dict(target_modules=['q_proj', 'down_proj']),
                  head=dict(target_modules=['q_proj', 'lm_head']),
                  whole_head=dict(target_modules=['q_proj'], modules_to_save=['lm_head']),
                  rows=dict(target_modules=['q_proj', 'down_proj'], trainable_token_indices=dict.fromkeys(
                      ('embed_tokens', 'lm_head'), [5, 9, 299])),
                  rows_and_head=dict(target_modules=['q_proj', 'lm_head'],
                                     trainable_token_indices=dict(embed_tokens=[5])))[how]
    model = get_peft_model(model, LoraConfig(**config, init_lora_weights=False))
    for n,p in model.named_parameters():
        if 'tokens_delta' in n: torch.nn.init.normal_(p, std=.1)
    return model.eval()

@pytest.mark.parametrize('how', ['full', 'lora', 'head', 'whole_head', 'rows', 'rows_and_head'])
def test_gradients_equal_the_plain_formula(large, how):
    "Relative difference of every weight's gradient at most 1e-6, whatever is trained"
    model = adapted(how)
    ids = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    ids[2, 4:8] = torch.tensor([5, 9, 299, 9])
    labels = ids.clone()
    labels[0, :9] = labels[1, :3] = -100
    weights = torch.randn(3, 19, generator=torch.Generator().manual_seed(1))
    found = head(model)
    chunked = gradients(model, token_logps(hidden_states(model, found, input_ids=ids), found.layer, labels, 7), weights)
    plain = gradients(model, label_logps(model(input_ids=ids).logits, labels)[0], weights)
    assert chunked.keys() == plain.keys() and len(plain) >= 5
    worst = max(((chunked[n]-plain[n]).norm()/plain[n].norm()).item() for n in plain)
    print(f'{how}: {worst:.1e}')
    assert worst <= 1e-6

@pytest.mark.parametrize('trained', [False, True])
def test_entropy_has_its_gradient(trained):
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 50).requires_grad_(trained)
    hidden,targets = torch.randn(20, 16, requires_grad=True),torch.randint(50, (20,))
    found = score(hidden, layer, targets, chunk=6, entropy=True)
    p = torch.distributions.Categorical(logits=layer(hidden))
    torch.testing.assert_close(found.entropy, p.entropy(), atol=1e-6, rtol=1e-6)
    ours,theirs = (torch.autograd.grad(x.sum(), hidden)[0] for x in (found.entropy, p.entropy()))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    value = score(hidden, layer, targets, chunk=6, entropy='value').entropy
    torch.testing.assert_close(value, p.entropy(), atol=1e-6, rtol=1e-6)
    assert not value.requires_grad

@pytest.mark.parametrize('trained', [False, True])
def test_smoothing_equals_torchs(trained):
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 50).requires_grad_(trained)
    hidden,targets = torch.randn(20, 16, requires_grad=True),torch.randint(50, (20,))
    ours = score(hidden, layer, targets, chunk=6, smoothing=.2, scale=.7).logps
    theirs = -torch.nn.functional.cross_entropy(.7*layer(hidden), targets, label_smoothing=.2, reduction='none')
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    weights = torch.randn(20)
    slopes = [torch.autograd.grad((x*weights).sum(), hidden)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-5)

@pytest.fixture
def large(monkeypatch):
    "Every head counts as a large one"
    from ftkit import logps
    monkeypatch.setattr(logps, 'LARGE', 0)

def with_rows(bias=False):
    "A head with three rows of PEFT's"
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.body,net.head = torch.nn.Linear(16, 16),torch.nn.Linear(16, 500, bias=bias)
    net = get_peft_model(net, LoraConfig(target_modules=['body'], trainable_token_indices=dict(head=[5, 9, 499])))
    rows, = (p for n,p in net.named_parameters() if 'tokens_delta' in n)
    torch.nn.init.normal_(rows)
    return net, net.base_model.model.head, rows

@pytest.mark.parametrize('options', [{}, dict(scale=.7), dict(softcap=2.), dict(smoothing=.2, scale=3.)], ids=str)
def test_rows_of_new_tokens(large, options):
    "Values and gradients of PEFT's formula, which makes the head anew; the matrix never exists, nothing is done twice"
    from torch.utils.flop_counter import FlopCounterMode
    from ftkit import logps
    net,layer,rows = with_rows()
    hidden,targets = torch.randn(100, 16, requires_grad=True),torch.tensor([5, 9, 499, 7, 0]*20)
    how = dict(scale=1., softcap=None, smoothing=0.) | options
    found = score(hidden, layer, targets, chunk=30, **options)
    wanted = logps._scored(hidden, layer, targets, entropy=False, **how)
    torch.testing.assert_close(found.logps, wanted[0], atol=2e-6, rtol=2e-6)
    assert (found.top1 == wanted[2]).all()
    weights = torch.randn(100)
    for x in (hidden, rows):
        ours,theirs = (torch.autograd.grad((v*weights).sum(), x, retain_graph=True)[0]
                       for v in (found.logps, wanted[0]))
        assert (ours-theirs).norm()/theirs.norm() < 1e-6
    def both_ways(): score(hidden, layer, targets, chunk=20, **options).logps.sum().backward()
    with FlopCounterMode(display=False) as counter: both_ways()
    assert counter.get_total_flops() == 2 * 2*100*16*500 + 3 * 2*100*16*3
    assert largest(both_ways) == 20*500
    with torch.no_grad(), FlopCounterMode(display=False) as counter: score(hidden, layer, targets, chunk=20, **options)
    assert counter.get_total_flops() == 2*100*16*500 + 2*100*16*3

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_rows_in_32_bits_of_a_head_in_16(large, dtype):
    "Their gradient is added up in 32 bits, far nearer than 16 bits could be"
    from ftkit import logps
    net,layer,rows = with_rows()
    net.base_model.model.head.token_adapter.base_layer.to(dtype)
    hidden,targets = torch.randn(100, 16, dtype=dtype, requires_grad=True),torch.tensor([5, 9, 499, 7, 0]*20)
    found = score(hidden, layer, targets, chunk=30).logps
    wanted = logps._scored(hidden, layer, targets, 1., None, 0., False)[0]
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)
    ours,theirs = (torch.autograd.grad(v.sum(), hidden, retain_graph=True)[0].float() for v in (found, wanted))
    assert (ours-theirs).norm()/theirs.norm() < 2*torch.finfo(dtype).eps
    odds = layer(hidden).float().softmax(-1)[:, [5, 9, 499]]
    exact = ((targets[:, None] == torch.tensor([5, 9, 499])).float() - odds).T @ hidden.float()
    mine = torch.autograd.grad(found.sum(), rows)[0]
    assert (mine-exact).norm()/exact.norm() < 1e-5

def test_heads_that_are_not_that_plain(large):
    "An adapter that is off, merged, hooked, or stands on a bias: each says what it says when it is called"
    hidden,targets = torch.randn(20, 16),torch.randint(500, (20,))
    def agrees(layer): torch.testing.assert_close(
        score(hidden, layer, targets, chunk=6).logps, layer(hidden).log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    for bias in (False, True):
        net,layer,_ = with_rows(bias)
        agrees(layer)
        with net.disable_adapter(): agrees(layer)
        handle = layer.register_forward_hook(lambda module, args, out: out*2)
        agrees(layer)
        handle.remove()
        net.merge_adapter()
        agrees(layer)

class Largest(TorchDispatchMode):
    "The number of elements of the largest tensor that any operation makes"
    seen = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = out if isinstance(out, (tuple, list)) else [out]
        self.seen = max([self.seen, *(t.numel() for t in made if torch.is_tensor(t))])
        return out

def largest(f):
    with Largest() as mode: f()
    return mode.seen

@pytest.mark.parametrize('trained', [False, True])
def test_the_whole_matrix_never_exists(trained):
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 5000, bias=False).requires_grad_(trained)
    hidden,labels = torch.randn(2, 101, 8, requires_grad=True),torch.randint(5000, (2, 101))
    chunked = largest(lambda: token_logps(hidden, layer, labels, chunk=20).sum().backward())
    plain = largest(lambda: label_logps(layer(hidden), labels)[0].sum().backward())
    assert chunked == 20*5000 and plain == 2*101*5000

def test_nothing_is_computed_twice_under_a_frozen_head():
    "Two products with the head for value and gradient, and no more"
    from torch.utils.flop_counter import FlopCounterMode
    layer = torch.nn.Linear(8, 5000, bias=False).requires_grad_(False)
    hidden,targets = torch.randn(100, 8, requires_grad=True),torch.randint(5000, (100,))
    with FlopCounterMode(display=False) as counter: score(hidden, layer, targets, chunk=30).logps.sum().backward()
    assert counter.get_total_flops() == 2 * 2*100*8*5000

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('trained', [False, True])
def test_half_precision_adds_up_in_fp32(dtype, trained):
    "Against the same half-precision products, normalised in fp64: only the rounding of logits and gradients is left"
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 3000, bias=False).to(dtype).requires_grad_(trained)
    hidden,targets = torch.randn(50, 32, dtype=dtype, requires_grad=True),torch.randint(3000, (50,))
    found = score(hidden, layer, targets, chunk=16).logps
    exact = layer(hidden).double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=2e-6, rtol=0)
    ours,theirs = (torch.autograd.grad(x.sum(), hidden)[0].float() for x in (found, exact))
    assert (ours-theirs).norm()/theirs.norm() < 2*torch.finfo(dtype).eps

def test_nothing_to_score():
    layer = torch.nn.Linear(8, 50)
    hidden = torch.randn(1, 5, 8, requires_grad=True)
    for trained in (True, False):
        layer.requires_grad_(trained)
        out = token_logps(hidden, layer, torch.full((1, 5), -100))
        assert out.shape == (1, 4) and not out.any()
        out.sum().backward()

def test_bf16_training_keeps_the_head_apart(tmp_path, capsys):
    "Measured in the arithmetic of the run: on the embedded model, in bf16, the logits are not kept"
    from ftkit.models import load_model, load_tokenizer
    from ftkit.tasks import rows
    from ftkit.train import train
    tok = load_tokenizer('embedded')
    for precision in ('fp32', 'bf16'):
        model = load_model('embedded', tok, 'lora', precision)
        run = train(model, tok, rows(32), out=tmp_path/precision, precision=precision, max_steps=2)
        assert run.log[0]['loss'] > 1
    assert 'kept whole' not in capsys.readouterr().out

def test_a_model_that_makes_logits_in_its_own_way_is_named(tmp_path, capsys):
    from ftkit.chat import set_template
    from ftkit.tasks import rows
    from ftkit.tiny import tiny
    from ftkit.train import train
    tok,model = tiny()
    set_template(tok)
    model.config.logit_scale = 3. # which Llama does not know
    train(model, tok, rows(32), out=tmp_path/'run', max_steps=1)
    assert 'kept whole' in capsys.readouterr().out
