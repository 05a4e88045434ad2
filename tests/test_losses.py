"Every loss and every metric against TRL's own code, run on the same log-probabilities"
from collections import defaultdict
from types import SimpleNamespace
import pytest, torch
from ftkit.dpo import DIVERGENCES, VARIANTS, dpo_loss, ld_logps, preference_metrics
from ftkit.grpo import CORRECTIONS, advantages, grpo_loss, loss_count, policy_metrics, sampler_weights, uncertain
from ftkit.kto import kto_kl, kto_loss
from ftkit.orpo import cpo_loss, log_odds_ratio, orpo_loss, simpo_loss
from ftkit.reward import reward_loss, reward_metrics

N,LENGTH = 6,12
SAME = SimpleNamespace(device=torch.device('cpu'), gather=lambda x: x, gather_for_metrics=lambda x: x)

def close(*two): torch.testing.assert_close(*map(torch.as_tensor, two), atol=1e-6, rtol=1e-6)

def answers(n=2*N, seed=0):
    "Prompts of 3 tokens, answers of 2 to 9: (per-token log-probabilities, of a reference, which tokens are trained)"
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(n, LENGTH, dtype=torch.long)
    for row,size in zip(mask, torch.randint(2, 10, (n,), generator=g)): row[3:3+size] = 1
    trained = mask[:, 1:]
    logps,ref = (-torch.rand(n, LENGTH-1, generator=g)*4*trained for _ in range(2))
    return logps, ref, mask

def scored(logps): return SimpleNamespace(log_probs=logps, entropy=0*logps, mean_logits=0*logps, is_top1=logps > -1)

def trl_dpo(loss_type, loss_weights=None, **settings):
    "(loss, metrics) of TRL's DPOTrainer on `answers`"
    from trl import DPOTrainer
    logps,ref,mask = answers()
    types = [loss_type] if isinstance(loss_type, str) else loss_type
    trainer = SimpleNamespace(model=torch.nn.Linear(1, 1), accelerator=SAME, aux_loss_enabled=False,
        ld_alpha=settings.get('ld_alpha'), precompute_ref_logps=True, beta=.1, loss_types=types,
        loss_weights=loss_weights or [1.]*len(types), f_divergence_type=settings.get('f_divergence_type', 'reverse_kl'),
        label_smoothing=settings.get('label_smoothing', 0.), args=SimpleNamespace(discopop_tau=.05),
        use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1)
    ref_sums = sums(ref, mask, settings.get('ld_alpha'))
    inputs = dict(input_ids=mask, attention_mask=mask, completion_mask=mask, ref_chosen_logps=ref_sums[:N],
                  ref_rejected_logps=ref_sums[N:])
    loss = DPOTrainer._compute_loss(trainer, lambda **_: scored(logps), inputs, False)
    return loss, {k: v[-1] for k,v in trainer._metrics['train'].items()}

def sums(logps, mask, ld_alpha=None):
    trained = mask[:, 1:]
    sizes = trained.sum(-1)
    if ld_alpha is None: return logps.sum(-1)
    return ld_logps(logps, trained, torch.cat([sizes[N:], sizes[:N]]), ld_alpha)

def ours_dpo(loss_type, loss_weights=None, ld_alpha=None, **options):
    logps,ref,mask = answers()
    model,reference,sizes = sums(logps, mask, ld_alpha),sums(ref, mask, ld_alpha),mask.sum(-1)
    four = model[:N], model[N:], reference[:N], reference[N:]
    lengths = sizes[:N], sizes[N:]
    return (dpo_loss(*four, beta=.1, loss_type=loss_type, loss_weights=loss_weights, lengths=lengths, **options).mean(),
            preference_metrics(*four, beta=.1, lengths=lengths))

SMOOTHED = {'robust', 'exo_pair', 'aot', 'aot_unpaired'} # TRL's others have no use for it

@pytest.mark.parametrize('name', VARIANTS)
def test_every_variant_of_dpo(name):
    options = dict(label_smoothing=.1) if name in SMOOTHED else {}
    loss,metrics = ours_dpo(name, **options)
    theirs,trl_metrics = trl_dpo(name, **options)
    close(loss, theirs)
    shared = metrics.keys() & trl_metrics.keys()
    assert len(shared) == 6
    for m in shared: close(metrics[m].mean(), trl_metrics[m])

def test_trl_has_no_other_variant():
    import inspect, re
    from trl import DPOTrainer
    named = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    assert named == VARIANTS.keys()

@pytest.mark.parametrize('name', DIVERGENCES)
def test_divergences(name):
    close(*(f('sigmoid', f_divergence_type=name)[0] for f in (ours_dpo, trl_dpo)))

@pytest.mark.parametrize('alpha', [0., .3, 1.])
def test_length_desensitised(alpha): close(*(f('sigmoid', ld_alpha=alpha)[0] for f in (ours_dpo, trl_dpo)))

def test_mixtures():
    mix = ['sigmoid', 'bco_pair', 'sft'],[.8, .2, 1.]
    close(ours_dpo(*mix)[0], trl_dpo(*mix)[0])

def test_a_wrong_sign_is_noticed():
    "The broken twin: swapping the answers moves every paired variant"
    logps,ref,mask = answers()
    model,reference,sizes = logps.sum(-1),ref.sum(-1),mask.sum(-1)
    swapped = model[N:], model[:N], reference[N:], reference[:N]
    for name in VARIANTS:
        options = dict(label_smoothing=.1) if name in SMOOTHED else {}
        loss = dpo_loss(*swapped, loss_type=name, lengths=(sizes[N:], sizes[:N]), **options).mean()
        assert (loss-trl_dpo(name, **options)[0]).abs() > 1e-4, name

@pytest.mark.parametrize('loss_type', ['kto', 'apo_zero_unpaired'])
def test_kto(loss_type):
    from trl import KTOTrainer
    logps,ref,mask = answers(N)
    apart,ref_apart,_ = answers(N, seed=1)
    label = torch.tensor([True, False, True, True, False, True])
    stands = (apart+.5).sum(-1)
    given = iter([stands])
    trainer = SimpleNamespace(model=torch.nn.Linear(1, 1), accelerator=SAME, aux_loss_enabled=False, beta=.1,
        precompute_ref_logps=True, calculate_KL=loss_type == 'kto', loss_type=loss_type, desirable_weight=1.,
        undesirable_weight=2., _compute_kl_logps=lambda *_: next(given),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1)
    inputs = dict(input_ids=mask, attention_mask=mask, completion_mask=mask, label=label, ref_logps=ref.sum(-1),
                  ref_KL_logps=ref_apart.sum(-1))
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: scored(logps), inputs, False)
    kl = kto_kl(stands, ref_apart.sum(-1)) if loss_type == 'kto' else 0.
    ours = kto_loss(logps.sum(-1), ref.sum(-1), label, kl, beta=.1, undesirable_weight=2., loss_type=loss_type)
    close(ours.mean(), theirs)
    close(kl, trainer._metrics['train']['kl'][-1])

@pytest.mark.parametrize('options', [{}, dict(margin=torch.rand(N, generator=torch.Generator().manual_seed(3))),
                                     dict(center=.01)], ids=['plain', 'margin', 'centred'])
def test_reward(options):
    from trl import RewardTrainer
    rewards = torch.randn(2*N, 1, generator=torch.Generator().manual_seed(0))
    trainer = SimpleNamespace(model=torch.nn.Linear(1, 1), accelerator=SAME, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(center_rewards_coefficient=options.get('center')),
        _metrics=defaultdict(lambda: defaultdict(list)))
    inputs = dict(attention_mask=torch.ones(2*N, 4)) | {k: v for k,v in options.items() if k == 'margin'}
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=rewards), inputs)
    chosen,rejected = rewards[:N, 0],rewards[N:, 0]
    close(reward_loss(chosen, rejected, **options).mean(), theirs)
    for name,value in reward_metrics(chosen, rejected).items(): close(value, trainer._metrics['train'][name][-1])

def test_orpo():
    from trl.experimental.orpo import ORPOTrainer
    chosen,rejected = -torch.rand(2, N, generator=torch.Generator().manual_seed(0))*3
    trainer = SimpleNamespace(accelerator=SAME, beta=.1)
    losses,*_,log_odds = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    close(orpo_loss(chosen, rejected, beta=.1), -chosen-losses)
    close(log_odds_ratio(chosen, rejected).mean(), log_odds)

@pytest.mark.parametrize('loss_type', ['sigmoid', 'hinge', 'ipo', 'simpo'])
@pytest.mark.parametrize('alpha', [0., .4])
def test_cpo(loss_type, alpha):
    from trl.experimental.cpo import CPOTrainer
    chosen,rejected = -torch.rand(2, N, generator=torch.Generator().manual_seed(0))*3
    smoothing = .1 if loss_type in ('sigmoid', 'simpo') else 0.
    trainer = SimpleNamespace(accelerator=SAME, beta=2., alpha=alpha, loss_type=loss_type, simpo_gamma=.5,
                              label_smoothing=smoothing)
    theirs,*_ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    if loss_type == 'simpo': ours = simpo_loss(chosen, rejected, 2., .5, label_smoothing=smoothing, alpha=alpha)
    else: ours = cpo_loss(chosen, rejected, 2., loss_type, smoothing, alpha=alpha)
    close(ours, theirs)

# groups

TOKENS = 9

def rollouts(seed=0):
    "Eight answers of 1 to 9 tokens: what policy, sampler and reference say of each token, entropies, mask, advantages"
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(TOKENS) < torch.tensor([9, 4, 1, 7, 3, 9, 5, 2])[:, None]
    logps,old,ref,entropy = (-torch.rand(8, TOKENS, generator=g)*2 for _ in range(4))
    return logps.requires_grad_(), old, ref, -entropy, mask, advantages(torch.rand(8, generator=g), 4)

def trl_group(loss_type='grpo', importance_sampling_level='token', beta=0., epsilon=.2, epsilon_high=.2, delta=None,
              quantile=1., ratio=None, entropy_coef=0.):
    "(loss, gradient, metrics) of TRL's GRPOTrainer on `rollouts`"
    from trl import GRPOTrainer
    logps,old,ref,entropies,mask,A = rollouts()
    model = torch.nn.Linear(1, 1)
    one = SimpleNamespace(**vars(SAME), num_processes=1, sync_gradients=True, reduce=lambda x, reduction: x,
                          pad_across_processes=lambda x, **_: x)
    trainer = SimpleNamespace(model=model, accelerator=one, aux_loss_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, None), top_entropy_quantile=quantile,
        off_policy_mask_threshold=None, importance_sampling_level=importance_sampling_level, beta=beta,
        loss_type=loss_type, epsilon_low=epsilon, epsilon_high=epsilon_high, use_vllm=ratio is not None,
        vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1, max_completion_length=20,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        _entropy_bonus_enabled=entropy_coef > 0, use_adaptive_entropy=False, entropy_coef=entropy_coef,
        _metrics=defaultdict(lambda: defaultdict(list)))
    trainer.get_high_entropy_mask = lambda *args: GRPOTrainer.get_high_entropy_mask(trainer, *args)
    inputs = dict(prompt_ids=mask[:, :2], prompt_mask=mask[:, :2], completion_ids=mask, completion_mask=mask.long(),
        advantages=A, old_per_token_logps=old, ref_per_token_logps=ref, num_items_in_batch=mask.sum(),
        importance_sampling_ratio=ratio)
    loss = GRPOTrainer._compute_loss(trainer, model, inputs)
    return loss, *torch.autograd.grad(loss, logps), {k: v[-1] for k,v in trainer._metrics['train'].items()}

GROUPS = {k: dict(loss_type=k) for k in ('grpo', 'bnpo', 'dr_grpo', 'dapo')} | {
    'cispo': dict(loss_type='cispo', epsilon_high=1.4), 'clip higher': dict(epsilon_high=.6),
    'delta': dict(delta=1.3), 'gspo': dict(importance_sampling_level='sequence', epsilon=.01, epsilon_high=.02),
    'gspo of tokens': dict(loss_type='dapo', importance_sampling_level='sequence'),
    'beta': dict(beta=.3), 'dapo with beta': dict(loss_type='dapo', beta=.3),
    'dr_grpo with beta': dict(loss_type='dr_grpo', beta=.1),
    'cispo with beta': dict(loss_type='cispo', beta=.1, epsilon_high=2.)}

@pytest.mark.parametrize('case', GROUPS)
def test_losses_of_groups(case):
    options = dict(GROUPS[case])
    theirs,slope,metrics = trl_group(**options)
    level = options.pop('importance_sampling_level', 'token')
    logps,old,ref,_,mask,A = rollouts()
    kind = dict(loss_type='grpo') | options
    each = grpo_loss(logps, old, A, mask, level=level, ref_logps=ref, max_completion_length=20, **kind)
    ours = each.sum()/loss_count(mask, kind['loss_type'])
    close(ours, theirs)
    close(*torch.autograd.grad(ours, logps), slope)
    if kind['loss_type'] == 'cispo' or 'delta' in options: return # TRL counts others as clipped there
    limits = {k: v for k,v in kind.items() if k.startswith('epsilon')}
    found = {k: a/b for k,(a,b) in policy_metrics(logps, old, A, mask, level, **limits).items()}
    if level == 'token': close(found['clip_share'], metrics['clip_ratio/region_mean'])

def test_undecided_tokens_and_the_entropy_bonus():
    logps,old,_,entropies,mask,A = rollouts()
    theirs,slope,_ = trl_group('dapo', quantile=.4, entropy_coef=.1)
    some = uncertain(entropies, mask, .4)
    bonus = (entropies*some).sum()/some.sum()
    ours = grpo_loss(logps, old, A, mask, weights=some).sum()/loss_count(mask) - .1*bonus
    close(ours, theirs)
    close(*torch.autograd.grad(ours, logps), slope)

@pytest.mark.parametrize('mode', CORRECTIONS)
def test_the_sampler_is_another_model(mode):
    "The ratio as TRL computes it when it has rolled out, and the loss with it"
    logps,old,sampled,_,mask,A = rollouts()
    sampled[0, 1] = float('nan')
    low,high = (.5, 1.5) if mode.startswith('token') else (.3, 4.)
    ours = sampler_weights(old, sampled, mask, mode, low, high)
    gap = ((old-sampled)*mask).nan_to_num(0.)
    plain = (gap if mode.startswith('token') else gap.sum(-1, keepdim=True)).exp()
    out = (plain < low) | (plain > high)
    assert out.any() and not out.all()
    close(ours, plain.clamp(low, high) if mode.endswith('truncate') else plain.masked_fill(out, 0.))
    theirs,slope,_ = trl_group('dapo', ratio=ours)
    loss = grpo_loss(logps, old, A, mask, weights=ours).sum()/loss_count(mask)
    close(loss, theirs)
    close(*torch.autograd.grad(loss, logps), slope)

def test_rloo():
    "Advantages and loss as TRL's RLOOTrainer has them"
    from trl import RLOOTrainer
    logps,old,_,entropies,mask,_ = rollouts()
    rewards = torch.tensor([1., 0, .5, .2, 0, 0, float('nan'), 1])
    grouped = rewards.view(2, 4)
    A = advantages(rewards, 4, 'none', 'others')
    close(A, (rewards - ((grouped.nansum(1, keepdim=True)-grouped)/torch.tensor([[3.], [2.]])).view(-1)).nan_to_num(0.))
    trainer = SimpleNamespace(model=torch.nn.Linear(1, 1), aux_loss_enabled=False, epsilon_low=.2, epsilon_high=.2,
        accelerator=SimpleNamespace(**vars(SAME), reduce=lambda x, reduction: x),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, None),
        _metrics=defaultdict(lambda: defaultdict(list)))
    inputs = dict(prompt_ids=mask[:, :2], prompt_mask=mask[:, :2], completion_ids=mask, completion_mask=mask.long(),
                  advantages=A, old_logps=(old*mask).sum(1))
    theirs = RLOOTrainer._compute_loss(trainer, trainer.model, inputs)
    ours = grpo_loss(logps, old, A, mask, 'grpo', 'answer').sum()/loss_count(mask, 'grpo')
    close(ours, theirs)
    close(*(torch.autograd.grad(x, logps)[0] for x in (ours, theirs)))
