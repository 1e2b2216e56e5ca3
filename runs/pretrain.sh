#!/usr/bin/env bash
# Pretrain the backbone that evercell ships, on every labelled study of DATA that is not a test study. Unlabelled ones
# hold it back (docs/benchmarks.md, Pretraining); one of them is held out.
#
#     bash runs/pretrain.sh OUTPUT [DATA]
#     bash runs/pretrain.sh --without-tasks OUTPUT [DATA]    for benchmarks/transfer.py: no study of any of its tasks
#     bash runs/pretrain.sh --unlabelled OUTPUT [DATA]       on the unlabelled studies too
#     bash runs/pretrain.sh OUTPUT DATA OPTION...            with further options of `evercell pretrain`
#
# DATA holds labelled/{human,mouse}/*.h5ad and unlabelled/{human,mouse}/*.h5ad; ../shared/data by default. The state is
# kept in OUTPUT.state: the same command takes an interrupted run up again. About 15 minutes of one CPU core.
set -euo pipefail

left_out="zheng_sorted_facs hao_small_pbmc symphony_pbmc_2tech ding_pbmc_drop_seq ding_pbmc_indrops tritschler_pancreas
panc8_small_5tech xin_delta_gamma_raw liao_balf_covid baron_mouse_pancreas lung_development_atlas_subset
jaitin_spleen_sorted"
of_tasks="kang_pbmc pbmc3k baron_human muraro_pancreas fasolino_pancreas travaglini_lung_subset pbmc4k_labelled
liu_covid_pbmc kim_luad_multitissue tm_lung_10x_P7_8 zilionis_lung_immune nkx21_lung_at2 riemondy_lung_injury_subset"
held_out="pbmc1k_v3_10x mca_stomach_intestine_small htan_breast_liver_met"

unlabelled=pbmc1k_v3_10x
while [[ "${1:-}" == --* ]]; do
    case "$1" in
        --without-tasks) left_out="$left_out $of_tasks" ;;
        --unlabelled) unlabelled="*" ;;
        *) echo "$1 is no option of this script" >&2; exit 2 ;;
    esac
    shift
done
output=${1:?name the folder of the model to be made}
data=${2:-$(dirname "$0")/../../shared/data}
options=("${@:3}")

shopt -s nullglob
files=()
for file in "$data"/labelled/*/*.h5ad "$data"/unlabelled/*/$unlabelled.h5ad; do
    name=$(basename "$file" .h5ad)
    case " $(echo $left_out) " in *" $name "*) ;; *) files+=("$file") ;; esac
done
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} evercell pretrain "${files[@]}" --labels cell_type --samples "${SAMPLES:-320000}" \
    --seed 0 --resume "$output.state" $(printf -- '--held-out %s ' $held_out) --output "$output" "${options[@]}"
