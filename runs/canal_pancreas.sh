#!/usr/bin/env bash
# CANAL's pancreas experiment in small: three studies learnt one after the other, two that no stage has seen.
#
#     bash runs/canal_pancreas.sh OUTPUT [DATA]
#
# DATA holds labelled/human/*.h5ad; ../shared/data by default. Three minutes of one CPU core. PRESET=canal takes the
# paper's own hyper-parameters (a Performer over 1,000 genes, its head, bank and rates), for which a GPU is needed;
# SAMPLES=N shortens its trainings.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
output=${1:?name a folder}
data=${2:-$here/../../shared/data}/labelled/human
options=(${PRESET:+--preset "$PRESET"} ${SAMPLES:+--samples "$SAMPLES"})
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$output"

# One study tells two kinds of stellate cells apart, two do not: all names stay, as types of their own.
printf 'activated_stellate: activated_stellate\nquiescent_stellate: quiescent_stellate\n' > "$output/baron.yaml"
printf 'stellate: stellate\n' > "$output/fasolino.yaml"
evercell train "$data/muraro_pancreas.h5ad" --labels cell_type --donor donor "${options[@]}" --overwrite \
    --output "$output/stage1"
evercell update "$output/stage1" "$data/baron_human.h5ad" --labels cell_type --donor donor "${options[@]}" --overwrite \
    --mapping "$output/baron.yaml" --accept-proposals --force --output "$output/stage2"
evercell update "$output/stage2" "$data/fasolino_pancreas.h5ad" --labels cell_type --donor donor "${options[@]}" \
    --overwrite --mapping "$output/fasolino.yaml" --accept-proposals --force --output "$output/stage3"
evercell log "$output/stage3"
for study in tritschler_pancreas panc8_small_5tech; do
    echo "== $study, which no stage has seen =="
    evercell annotate "$data/$study.h5ad" --model "$output/stage3" --output "$output/$study.h5ad"
    evercell evaluate "$output/$study.h5ad" --labels cell_type
done
