#!/bin/sh
# make.sh DIR: an arterial of six signals, 260 to 340 m apart, with side streets,
# crossings on all arms, pedestrians and a bus line. Made by netgenerate, so that
# the same SUMO makes the same scenario; nothing of it is kept here.
set -eu
dir=${1:?where to}
mkdir -p "$dir"
cd "$dir"
netgenerate --grid --grid.x-number 6 --grid.y-number 1 --grid.x-length 300 --grid.attach-length 220 \
	--default.lanenumber 2 --default.speed 13.89 --default-junction-type traffic_light \
	--no-turnarounds --sidewalks.guess --crossings.guess --tls.green.time 30 --tls.yellow.time 3 \
	--seed 7 --output-file arterial.net.xml --no-warnings >/dev/null
# Junctions are A0 to F0 from west to east; edges are named by the two they join.
{
	echo '<routes>'
	echo '<vType id="car" length="5" minGap="2.5" sigma="0.5" speedFactor="norm(1,0.1)"/>'
	echo '<vType id="bus" vClass="bus" length="12" accel="1.2"/>'
	arm="A0B0 B0C0 C0D0 D0E0 E0F0"
	back="F0E0 E0D0 D0C0 C0B0 B0A0"
	echo "<route id=\"east\" edges=\"left0A0 $arm F0right0\"/>"
	echo "<route id=\"west\" edges=\"right0F0 $back A0left0\"/>"
	# East in the morning: 850 an hour that way, 550 back.
	echo '<flow id="art.e" type="car" route="east" begin="0" end="3600" vehsPerHour="850" departLane="best" departSpeed="max"/>'
	echo '<flow id="art.w" type="car" route="west" begin="0" end="3600" vehsPerHour="550" departLane="best" departSpeed="max"/>'
	n=0
	for j in A B C D E F; do
		echo "<flow id=\"side.$j.s\" type=\"car\" from=\"top${n}${j}0\" to=\"${j}0bottom${n}\" begin=\"$((n * 3))\" end=\"3600\" vehsPerHour=\"170\" departLane=\"best\"/>"
		echo "<flow id=\"side.$j.n\" type=\"car\" from=\"bottom${n}${j}0\" to=\"${j}0top${n}\" begin=\"$((n * 5))\" end=\"3600\" vehsPerHour=\"140\" departLane=\"best\"/>"
		echo "<flow id=\"in.$j\" type=\"car\" from=\"top${n}${j}0\" to=\"F0right0\" begin=\"$((7 + n))\" end=\"3600\" vehsPerHour=\"40\" departLane=\"best\"/>"
		echo "<flow id=\"out.$j\" type=\"car\" from=\"left0A0\" to=\"${j}0bottom${n}\" begin=\"$((11 + n))\" end=\"3600\" vehsPerHour=\"35\" departLane=\"best\"/>"
		echo "<personFlow id=\"walk.$j\" begin=\"$((n * 13))\" end=\"3600\" period=\"60\"><walk from=\"top${n}${j}0\" to=\"${j}0bottom${n}\"/></personFlow>"
		n=$((n + 1))
	done
	echo '<flow id="bus" type="bus" route="east" begin="20" end="3600" period="300"><stop busStop="mid" duration="20"/></flow>'
	echo '</routes>'
} >demand.xml
sort_by_begin() { # SUMO wants departures in order
	awk -F'begin="' '/begin=/{split($2,a,"\""); printf "%010d\t%s\n", a[1], $0; next} {h=h $0 "\n"} END{}' "$1" | sort -s -n | cut -f2-
}
{
	echo '<routes>'
	grep -E '<vType|<route ' demand.xml
	sort_by_begin demand.xml
	echo '</routes>'
} >arterial.rou.xml
rm demand.xml
cat >arterial.add.xml <<'X'
<additional><busStop id="mid" lane="C0D0_1" startPos="120" endPos="150"/></additional>
X
cat >arterial.sumocfg <<'X'
<configuration>
  <input>
    <net-file value="arterial.net.xml"/>
    <route-files value="arterial.rou.xml"/>
    <additional-files value="arterial.add.xml"/>
  </input>
  <time><begin value="0"/><end value="3600"/></time>
</configuration>
X
