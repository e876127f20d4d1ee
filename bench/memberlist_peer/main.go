// memberlist itself, at its LAN defaults, N nodes in one process on loopback: what bench/gossip.py measures us against.
//
//	idle       bytes a second and node that it hands to its sockets, sent and received (IP headers not counted)
//	change     a node's metadata changes: until every other node was told
//	death      a node's sockets are closed without a word: until every other node lists it as dead
//
// One line of JSON on stdout. Built against Debian's golang-github-hashicorp-memberlist-dev (GOPATH mode).
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io/ioutil"
	"log"
	"os"
	"sort"
	"sync"
	"time"

	metrics "github.com/armon/go-metrics"
	"github.com/hashicorp/memberlist"
)


// witness is one node's delegate: it counts what it is told of the node under test.
type witness struct {
	mu      sync.Mutex
	meta    []byte
	updated map[string]time.Time
	left    map[string]time.Time
}

func (w *witness) NodeMeta(limit int) []byte                  { w.mu.Lock(); defer w.mu.Unlock(); return w.meta }
func (w *witness) NotifyMsg([]byte)                           {}
func (w *witness) GetBroadcasts(overhead, limit int) [][]byte { return nil }
func (w *witness) LocalState(join bool) []byte                { return nil }
func (w *witness) MergeRemoteState(buf []byte, join bool)     {}
func (w *witness) NotifyJoin(*memberlist.Node)                {}
func (w *witness) NotifyLeave(n *memberlist.Node)             { w.note(w.left, n.Name) }
func (w *witness) NotifyUpdate(n *memberlist.Node)            { w.note(w.updated, n.Name) }
func (w *witness) note(book map[string]time.Time, name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	book[name] = time.Now()
}

func (w *witness) at(book map[string]time.Time, name string) (time.Time, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	at, known := book[name]
	return at, known
}

func counters(sink *metrics.InmemSink) (sent, received float64) {
	for _, interval := range sink.Data() {
		interval.RLock()
		for name, counter := range interval.Counters {
			switch name {
			case "memberlist.udp.sent", "memberlist.tcp.sent":
				sent += counter.Sum
			case "memberlist.udp.received":
				received += counter.Sum
			}
		}
		interval.RUnlock()
	}
	return
}

func start(number int, quiet *log.Logger, metaBytes int) (*memberlist.Memberlist, *witness) {
	config := memberlist.DefaultLANConfig()
	config.Name = fmt.Sprintf("pi-%d", number)
	config.BindAddr, config.BindPort = "127.0.0.1", 0
	config.Logger = quiet
	w := &witness{meta: make([]byte, metaBytes), updated: map[string]time.Time{}, left: map[string]time.Time{}}
	config.Delegate, config.Events = w, w
	list, err := memberlist.Create(config)
	if err != nil {
		panic(err)
	}
	return list, w
}

// until waits for every witness to have been told of name, and returns the seconds each took since began, sorted.
func until(others []*witness, book func(*witness) map[string]time.Time, name string, began time.Time, patience time.Duration) []float64 {
	times := []float64{}
	for _, w := range others {
		for {
			at, known := w.at(book(w), name)
			if known && at.After(began) {
				times = append(times, at.Sub(began).Seconds())
				break
			}
			if time.Since(began) > patience {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	sort.Float64s(times)
	return times
}

func main() {
	nodes := flag.Int("nodes", 4, "")
	idle := flag.Duration("idle", 30*time.Second, "")
	deaths := flag.Int("deaths", 1, "nodes killed one after another, each replaced by a new one")
	flag.Parse()
	sink := metrics.NewInmemSink(time.Hour, 2*time.Hour)
	conf := metrics.DefaultConfig("")
	conf.EnableHostname, conf.EnableServiceLabel, conf.EnableRuntimeMetrics = false, false, false
	conf.ServiceName = ""
	metrics.NewGlobal(conf, sink)
	quiet := log.New(ioutil.Discard, "", 0)

	lists, witnesses := []*memberlist.Memberlist{}, []*witness{}
	join := func(number int) {
		list, w := start(number, quiet, 250)
		if len(lists) > 0 {
			if _, err := list.Join([]string{lists[0].LocalNode().Address()}); err != nil {
				panic(err)
			}
		}
		lists, witnesses = append(lists, list), append(witnesses, w)
	}
	for number := 0; number < *nodes; number++ {
		join(number)
	}
	settled := func() bool {
		for _, list := range lists {
			if list.NumMembers() != *nodes {
				return false
			}
		}
		return true
	}
	for !settled() {
		time.Sleep(100 * time.Millisecond)
	}
	time.Sleep(5 * time.Second)

	sent0, received0 := counters(sink)
	time.Sleep(*idle)
	sent1, received1 := counters(sink)
	seconds := idle.Seconds() * float64(*nodes)
	out := map[string]interface{}{
		"nodes": *nodes, "sent": (sent1 - sent0) / seconds, "udp_received": (received1 - received0) / seconds,
	}

	changes, deadAt, never := []float64{}, []float64{}, 0
	for round := 0; round < *deaths; round++ {
		teller := lists[len(lists)-1]
		name := teller.LocalNode().Name
		own := witnesses[len(witnesses)-1]
		own.mu.Lock()
		own.meta = append([]byte{byte(round + 1)}, own.meta[1:]...)
		own.mu.Unlock()
		began := time.Now()
		go teller.UpdateNode(10 * time.Second)
		times := until(witnesses[:len(witnesses)-1], func(w *witness) map[string]time.Time { return w.updated }, name, began, 40*time.Second)
		changes = append(changes, times...)
		never += len(witnesses) - 1 - len(times)
		time.Sleep(500 * time.Millisecond)

		began = time.Now()
		teller.Shutdown()
		deadAt = append(deadAt, until(witnesses[:len(witnesses)-1], func(w *witness) map[string]time.Time { return w.left }, name, began, 90*time.Second)...)
		lists, witnesses = lists[:len(lists)-1], witnesses[:len(witnesses)-1]
		if round+1 < *deaths {
			join(*nodes + round)
			for !settled() {
				time.Sleep(100 * time.Millisecond)
			}
		}
	}
	out["change_s"], out["death_s"], out["change_missed"] = changes, deadAt, never
	json.NewEncoder(os.Stdout).Encode(out)
}
