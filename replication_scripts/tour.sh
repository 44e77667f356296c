#!/usr/bin/env bash
# The tour: five methods on one small language model and real text, ending in one page.
#
# What:      each stage below is a plain command; copy any of them and change its flags.
# Expected:  about five minutes on two CPU cores at SCALE=small; the page says what was found.
# Hardware:  any machine; no GPU, no network, no login.
# Resume:    run it again; finished stages return at once, an interrupted one continues.
#
#   bash replication_scripts/tour.sh                 # SCALE=tiny|small|paper, ROOT=runs/tour
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SCALE=${SCALE:-small}
ROOT=${ROOT:-runs/tour}
case "$SCALE" in
  tiny) KIND=tiny ;;
  small) KIND=tour ;;
  paper) KIND=paper ;;
  *)
    echo "SCALE=$SCALE: expected tiny, small or paper" >&2
    exit 2
    ;;
esac
[ "$SCALE" = small ] || ROOT=$ROOT-$SCALE
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false

stage() { # stage "question" command…: say what is asked and what is run, then run it
  echo
  echo "── $1"
  shift
  echo "   $*"
  local begin=$SECONDS
  "$@"
  echo "   ($((SECONDS - begin)) s)"
}

# 0. The model that all five work on ships with the repository; this shows what the machine offers.
stage "What is this machine?" \
  python -m workbench.doctor

# 1. You should see attention solve recall, and mixers without memory of the context stay at chance.
stage "Which architecture will scale?" \
  python -m mad.compare --config "configs/mad/compare.$KIND.yaml" --root "$ROOT"

# 2. You should see perplexity against true bits per weight, low-rank plus lattice below RTN and GPTQ.
stage "How small can the weights be?" \
  python -m lplr_q.run --config "configs/lplr_q/run.$KIND.yaml" --root "$ROOT"

# 3. You should see agreement with the full model against work, in three accountings.
stage "How many layers does this token need?" \
  python -m early_exit.sweep_thresholds --config "configs/early_exit/sweep_thresholds.$KIND.yaml" --root "$ROOT"

# 4. You should see how much of a document's effect survives without the document.
stage "Can a prompt move into the weights?" \
  python -m sycomode.consolidate --config "configs/sycomode/consolidate.$KIND.yaml" --root "$ROOT"

# 5. You should see which answers are admitted, how accurate those are, and foreign input rejected.
stage "When may a prediction be trusted?" \
  python -m sdm.reexpress --config "configs/sdm/reexpress.$KIND.yaml" --root "$ROOT"

# 6. One self-contained page.
stage "All of it on one page" \
  python -m workbench.report "$ROOT"/mad/compare-* "$ROOT"/lplr_q/run-* \
  "$ROOT"/early_exit/sweep_thresholds-* "$ROOT"/sycomode/consolidate-* "$ROOT"/sdm/reexpress-* \
  --out "$ROOT/report.html" --title "Fivefold: five methods on one small language model"

echo
echo "the report: $(pwd)/$ROOT/report.html   ($SECONDS s)"
