"""What ``dpfa budget`` says; translated like the ledger's refusals."""

from dpfa_jax.messages import N_

VERIFIED = N_(
    "{count} entries; all are as they were written. The last is {number}:{hash}. Note it "
    "elsewhere: dpfa budget verify --receipt finds old copies."
)
BREACH = N_("Policy {policy}: a breach is to be reported within {hours} hours.")
OPENED = N_("{scope}: the budget is ε = {epsilon} at δ = {delta} from now on ({reason}).")
EMPTY = N_("No budget was opened yet (dpfa budget new).")
SCOPE = N_("scope")
BUDGET = N_("budget ε")
SPENT = N_("spent ε")
LEFT = N_("left ε")
POLICY = N_("policy")
REGION = N_("region")
STEPS = N_("steps")
BATCH = N_("batch size")
NOISE = N_("noise multiplier")
LEAST = N_("Noise multiplier {noise} spends ε = {epsilon} at δ = {delta} in {steps} steps.")
ARGUMENT = N_("{flag} {value}: allowed is {allowed}.")
WHOLE = N_("a whole number >= 1")
AT_MOST = N_("at most {limit}")
UP_TO_A_MILLION = N_("a number between 0 and 1e6")
RECEIPT = N_("NUMBER:HASH, as this command prints it")
ONLY_NEW = N_(
    "{flags}: allowed for a new scope only; '{scope}' has them already, and they do not change."
)
NEEDED = N_("{flags}: needed for a new scope.")
TOGETHER = N_("{flags}: allowed are both or none.")
NO_LAW = N_("No law sets ε or δ: policies are editable starting points and no legal advice.")
